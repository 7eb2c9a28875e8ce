"""Whole jobs on exported programs: LeNet-5 with BatchNorm and dropout on real digits, and text with two inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from app.contract.report import Report
from app.contract.spec import Finetune, Prune
from app.contract.training import Training
from tests.worker.helpers import MemorySplit, part_of
from tests.worker.jobs import Recorder, request_for, steps_of
from tests.worker.loading.programs import exported
from worker.data.base import Data
from worker.inspect import inspect_upload
from worker.request import RunRequest
from worker.run import run_job

pytestmark = pytest.mark.usefixtures("known_memory")

SIZES = {"train": 512, "validation": 100, "test": 300, "calibration": 64}


@pytest.fixture(scope="module")
def digits(mnist: Data) -> Data:
    """A part of the digits, so that a job takes seconds."""
    return part_of(mnist, SIZES)


def lenet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10)),
    )


def request_of(folder: Path, data: Data | None, steps: tuple[Any, ...], content: bytes, **changes: Any) -> RunRequest:
    """The request of a job on a program."""
    return request_for(folder, "upload.pt2", content, {"task": "image-classification"}, data, steps, **changes)


def accuracy(path: Path, data: Data) -> float:
    """On the test split, by plain torch or ONNX Runtime."""
    split = data.splits["test"]
    assert isinstance(split, MemorySplit)
    assert split.targets is not None
    if path.suffix == ".onnx":
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        logits = session.run(None, {session.get_inputs()[0].name: split.inputs.numpy()})[0]
    else:
        with torch.no_grad():
            logits = torch.export.load(path).module()(split.inputs).numpy()
    return float(np.mean(logits.argmax(1) == split.targets.numpy()))


def by_name(report: Report) -> dict[str, Any]:
    return {artifact.name: artifact for artifact in report.artifacts}


def test_a_program_is_trained_pruned_and_quantized(digits: Data, tmp_path: Path) -> None:
    content = exported(lenet().eval(), torch.randn(2, 1, 28, 28))
    first, *rest = steps_of("small", steps=40, lr=3e-3)
    # It comes untrained, so its teacher would teach it nothing.
    steps = (Finetune(training=Training(steps=60, lr=3e-3)), first, *rest)
    request = request_of(tmp_path / "job", digits, steps, content)
    result = run_job(request, Recorder())
    found = by_name(result.report)
    assert sorted(path.name for path in request.output.iterdir()) == ["model.onnx", "model.pt2"]
    for name, one in found.items():
        path = request.output / name
        assert one.measurement.metric.value == pytest.approx(accuracy(path, digits), abs=1e-9)
        assert one.measurement.metric.value > 0.5
        weights = [layer for layer in one.measurement.layers if len(layer.shape) > 1]
        zeros = sum(layer.sparsity * layer.parameters for layer in weights)
        assert zeros / sum(layer.parameters for layer in weights) >= 0.799
    uploaded = result.report.uploaded
    assert uploaded.metric is not None
    assert uploaded.metric.value == pytest.approx(accuracy(request.model_path, digits), abs=1e-9)
    assert uploaded.macs == 28 * 28 * 6 * 25 + 10 * 10 * 16 * 6 * 25 + 400 * 64 + 64 * 10
    assert {layer.bits for layer in found["model.onnx"].measurement.layers} == {8}
    assert found["model.onnx"].size_ratio > 2
    program = torch.export.load(request.output / "model.pt2")
    assert set(program.state_dict) == set(lenet().state_dict())
    assert int(program.state_dict["1.num_batches_tracked"]) > 0  # BatchNorm was in training mode while it trained


def test_an_inspection_tells_what_a_program_is(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(exported(lenet().eval(), torch.randn(2, 1, 28, 28)))
    facts = inspect_upload("model", path, path.name, {"task": "image-classification"}, tmp_path)
    assert facts.format == "pt2"
    assert facts.cost.macs == 28 * 28 * 6 * 25 + 10 * 10 * 16 * 6 * 25 + 400 * 64 + 64 * 10
    assert {(one.technique, one.applies) for one in facts.techniques} >= {("prune", True), ("quantize", True)}
    assert {layer.name: layer.type for layer in facts.layers}["4"] == "Conv2d"
    assert facts.outputs[0].shape == (10,)


class Words(nn.Module):
    """Token ids and their mask; the attention is nn.MultiheadAttention, whose weights no Linear holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = self.norm(x + self.attention(x, x, x, key_padding_mask=mask == 0, need_weights=False)[0])
        weights = mask.unsqueeze(-1).to(x.dtype)
        logits: torch.Tensor = self.head((x * weights).sum(1) / weights.sum(1))
        return logits


@pytest.mark.slow
def test_two_inputs_of_text(tmp_path: Path) -> None:
    """Which of two ids a sequence begins with: two arrays by name, and attention pruned while it is trained."""
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 20, (300, 8))
    labels = rng.integers(0, 2, 300)
    ids[:, :4] = labels[:, None]
    mask = np.ones_like(ids)
    mask[:, 6:] = rng.integers(0, 2, (300, 2))
    content = exported(Words().eval(), axes=(0, 1), ids=torch.ones(2, 8).long(), mask=torch.ones(2, 8).long())
    steps = (Prune(sparsity=0.5, training=Training(steps=120, lr=1e-2)),)
    request = request_of(tmp_path / "job", None, steps, content, export=("native",))
    path = tmp_path / "job" / "data.npz"
    arrays = {}
    for name, part in (("train", slice(0, 240)), ("test", slice(240, 300))):
        arrays |= {f"{name}_inputs.ids": ids[part], f"{name}_inputs.mask": mask[part], f"{name}_targets": labels[part]}
    np.savez(path, **arrays)
    spec = request.spec.model_copy(update={"dataset": "dst_00000000000000000000000000"})
    request = replace(
        request,
        spec=spec,
        dataset_path=path,
        dataset_filename=path.name,
        model_spec={"task": "text-classification"},
    )
    report = run_job(request, Recorder()).report
    assert {one.measurement.metric.value for one in report.artifacts if one.measurement.metric} == {1.0}
    layers = {layer.name: layer.sparsity for layer in by_name(report)["model.pt2"].measurement.layers}
    assert layers["attention.in_proj_weight"] > 0.2
    program = torch.export.load(request.output / "model.pt2").module()
    with torch.no_grad():
        logits = program(ids=torch.from_numpy(ids[240:]), mask=torch.from_numpy(mask[240:]))
    assert bool((logits.argmax(1).numpy() == labels[240:]).all())
