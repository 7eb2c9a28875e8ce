"""What several acceptance tests do: upload the user's model and data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app.client import Client


def upload(client: Client, lenet: Path) -> tuple[str, str]:
    """Uploads LeNet-5 and its digits; returns the ids of the model and the dataset."""
    model = client.upload_model(lenet / "lenet.safetensors", json.loads((lenet / "lenet.spec.json").read_text()))
    dataset = client.upload_dataset(lenet / "mnist.npz")
    return model["id"], dataset["id"]


def run(client: Client, model: str, dataset: str | None, **job: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Submits a job, waits for its success, returns it with its report."""
    spec = {"model": model} | ({"dataset": dataset} if dataset else {}) | job
    done = client.wait(client.submit(spec)["id"])
    assert done["state"] == "succeeded", done
    return done, client.report(done["id"])
