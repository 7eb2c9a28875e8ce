"""The smallest file over HTTP: submitted, fetched, unpacked from a terminal, and counted again."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import Service
from tests.acceptance.jobs import run, upload
from tests.acceptance.test_main_job import recompute

BRIEF: dict[str, Any] = {"steps": 120, "batch_size": 64, "lr": 0.003, "schedule": "cosine", "distill": {}}
STEP = {"technique": "compress", "rounds": 2, "max_accuracy_drop": 0.02, "training": BRIEF}


def test_compressed_packed_and_unpacked(tersor: Service, lenet: Path, tmp_path: Path) -> None:
    with tersor.client() as client:
        model, dataset = upload(client, lenet)
        done, report = run(client, model, dataset, steps=[STEP], export=["native", "packed"])
        files = {
            item["name"]: client.download(done["id"], item["name"], tmp_path) for item in client.artifacts(done["id"])
        }
    native, packed = (item for item in report["artifacts"])
    path = files["model.tsr"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == packed["sha256"]
    assert packed["size_ratio"] > 8
    assert sum(packed["packed_bytes"].values()) == pytest.approx(path.stat().st_size)
    assert packed["measurement"]["metric"] == native["measurement"]["metric"]
    out = tmp_path / "unpacked.safetensors"
    command = [sys.executable, "-m", "app.cli", "unpack", str(path), "-o", str(out)]
    assert "10 tensors" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert recompute(out, lenet / "mnist.npz") == pytest.approx(packed["measurement"]["metric"]["value"])
    details = report["steps"][0]["details"]
    assert details["held"]
    assert [row["round"] for row in details["rounds"]] == [1, 2]


def test_a_recipe_says_what_it_delivers(tersor: Service, lenet: Path) -> None:
    with tersor.client() as client:
        model, dataset = upload(client, lenet)
        client.model(model, wait=30)
        client.dataset(dataset, wait=30)
        planned = client.dry_run({"model": model, "dataset": dataset, "recipe": "smallest"})
        assert [item["name"] for item in planned["artifacts"]] == ["model.safetensors", "model.tsr"]
        own = client.dry_run({"model": model, "dataset": dataset, "recipe": "smallest", "export": ["packed"]})
        assert [item["name"] for item in own["artifacts"]] == ["model.tsr"]
