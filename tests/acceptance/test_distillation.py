"""A student over HTTP: one upload teaches another, behind the walls of a job; accounts see their own models alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from app.client import Client
from tests.acceptance.conftest import Service
from tests.acceptance.jobs import run as run_job
from tests.acceptance.test_onnx import digits


def dense(before: int, after: int) -> dict[str, Any]:
    return {"type": "Linear", "in_features": before, "out_features": after}


def uploaded(client: Client, folder: Path, name: str, layers: list[dict[str, Any]], module: nn.Module) -> str:
    path = folder / f"{name}.safetensors"
    save_file(module.state_dict(), path)
    spec = {"task": "image-classification", "architecture": {"layers": layers}, "input": {"shape": [1, 8, 8]}}
    return str(client.upload_model(path, spec)["id"])


def test_an_upload_teaches_another_one(tersor: Service, tmp_path: Path) -> None:
    data, arrays = digits(tmp_path)
    torch.manual_seed(0)
    large = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    small = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(large.parameters(), 1e-2)
    inputs, targets = (torch.from_numpy(arrays[f"train_{name}"]) for name in ("inputs", "targets"))
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(large(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with tersor.client() as client:
        layers = [{"type": "Flatten"}, dense(64, 48), {"type": "ReLU"}, dense(48, 10)]
        teacher = uploaded(client, tmp_path, "large", layers, large)
        student = uploaded(client, tmp_path, "small", [{"type": "Flatten"}, dense(64, 10)], small)
        dataset = client.upload_dataset(data)["id"]
        step = {
            "technique": "distill",
            "student": {"kind": "model", "model": student},
            "training": {"epochs": 8, "lr": 1e-2, "distill": {"alpha": 1.0}},
        }
        done, report = run_job(client, teacher, dataset, steps=[step])
        details = report["steps"][0]["details"]
        assert (details["teacher_parameters"], details["student_parameters"]) == (48 * 65 + 10 * 49, 650)
        assert details["teacher_answers_kept"] == 1000
        path = client.download(done["id"], "model.safetensors", tmp_path)
        small.load_state_dict(load_file(path))
        with torch.no_grad():
            said = small(torch.from_numpy(arrays["test_inputs"])).argmax(1).numpy()
        right = float(np.mean(said == arrays["test_targets"]))
        native = next(one for one in report["artifacts"] if one["format"] == "native")
        assert native["measurement"]["metric"]["value"] == right > 0.85
        assert report["uploaded"]["parameters"] == details["teacher_parameters"]
