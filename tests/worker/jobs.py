"""Requests of whole jobs on real files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import nn

from app.contract.recipes import BY_NAME
from app.contract.spec import ResolvedSpec, Step
from app.contract.training import Training
from worker.data.base import Data
from worker.evaluation.compare import sha256
from worker.request import RunRequest

LENET_LAYERS: list[dict[str, Any]] = [
    {"type": "Conv2d", "in_channels": 1, "out_channels": 6, "kernel_size": 5, "padding": 2},
    {"type": "ReLU"},
    {"type": "MaxPool2d", "kernel_size": 2},
    {"type": "Conv2d", "in_channels": 6, "out_channels": 16, "kernel_size": 5},
    {"type": "ReLU"},
    {"type": "MaxPool2d", "kernel_size": 2},
    {"type": "Flatten"},
    {"type": "Linear", "in_features": 400, "out_features": 120},
    {"type": "ReLU"},
    {"type": "Linear", "in_features": 120, "out_features": 84},
    {"type": "ReLU"},
    {"type": "Linear", "in_features": 84, "out_features": 10},
]
# The worked example of the literature.
EXAMPLE_LAYERS: list[dict[str, Any]] = [
    {"type": "Conv2d", "in_channels": 3, "out_channels": 64, "kernel_size": 3, "padding": 1},
    {"type": "ReLU"},
    {"type": "Conv2d", "in_channels": 64, "out_channels": 128, "kernel_size": 3, "padding": 1},
    {"type": "ReLU"},
    {"type": "AdaptiveAvgPool2d", "output_size": 1},
    {"type": "Flatten"},
    {"type": "Linear", "in_features": 128, "out_features": 10},
]


@dataclass
class Recorder:
    """Takes what a job says about its progress."""

    said: list[tuple[float, str]] = field(default_factory=list)

    def __call__(self, share: float, step: str) -> None:
        self.said.append((share, step))


def steps_of(recipe: str, **training: Any) -> tuple[Step, ...]:
    """A recipe's steps with the given fields of every training replaced, so that a test trains for seconds."""
    return tuple(
        step.model_copy(update={"training": _changed(step.training, training)})
        if getattr(step, "training", None) is not None
        else step
        for step in BY_NAME[recipe].steps
    )


def _changed(training: Any, fields: dict[str, Any]) -> Training:
    return Training.model_validate({**training.model_dump(exclude={"epochs", "steps"}), **fields})


def job(
    folder: Path,
    module: nn.Module,
    layers: list[dict[str, Any]],
    shape: tuple[int, ...],
    data: Data | None,
    steps: tuple[Step, ...],
    **changes: Any,
) -> RunRequest:
    """A request as the supervisor makes one: files on disk, a scratch folder and an empty output folder."""
    spec = {
        "task": "image-classification",
        "architecture": {"layers": layers},
        "input": {"shape": list(shape), "dtype": "float32"},
    }
    return request_for(folder, "upload.safetensors", save(module.state_dict()), spec, data, steps, **changes)


def request_for(
    folder: Path,
    filename: str,
    content: bytes,
    spec: dict[str, Any],
    data: Data | None,
    steps: tuple[Step, ...],
    **changes: Any,
) -> RunRequest:
    """The same for a model that is uploaded as these bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / filename
    model.write_bytes(content)
    for name in ("scratch", "output"):
        (folder / name).mkdir()
    return RunRequest(
        job_id="job_00000000000000000000000000",
        spec=ResolvedSpec(
            model="mdl_00000000000000000000000000",
            dataset=None if data is None else "dst_00000000000000000000000000",
            recipe=None,
            steps=steps,
            export=changes.get("export", ("native", "onnx")),
            seed=changes.get("seed", 0),
        ),
        model_path=model,
        model_filename=filename,
        model_spec=spec,
        model_sha256=sha256(model),
        dataset_path=None if data is None else _save_arrays(data, folder / "data.npz"),
        dataset_filename=None if data is None else "data.npz",
        dataset_spec=None,
        scratch=folder / "scratch",
        output=folder / "output",
        threads=1,
    )


def _save_arrays(data: Data, path: Path) -> Path:
    arrays: dict[str, np.ndarray] = {}
    for name, split in data.splits.items():
        batch = split.read(range(len(split)))
        assert isinstance(batch.inputs, dict)
        arrays[f"{name}_inputs"] = batch.inputs["input"].numpy()
        if batch.targets is not None:
            arrays[f"{name}_targets"] = batch.targets.numpy()
    np.savez(path, **arrays)
    return path
