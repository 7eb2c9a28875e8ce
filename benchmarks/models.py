"""A small model over HTTP, for benchmarks of the service rather than of the techniques."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from app.client import Client
from worker.demo.train_lenet import SPEC, lenet


def pruning_job(client: Client, folder: Path) -> dict[str, Any]:
    """Uploads an untrained LeNet-5 and returns a job that prunes it without data."""
    torch.manual_seed(0)
    save_file(lenet().state_dict(), folder / "lenet.safetensors")
    model = client.upload_model(folder / "lenet.safetensors", SPEC)["id"]
    return {"model": model, "steps": [{"technique": "prune", "sparsity": 0.5}], "export": ["native"]}
