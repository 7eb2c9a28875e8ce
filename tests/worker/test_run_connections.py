"""Jobs that take connections out, on models of every kind: what is delivered loads, and has no weight of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.contract.budgets import Budget
from app.contract.errors import Unsupported
from app.contract.rewiring import Rewire
from app.contract.spec import Finetune, Quantize
from app.contract.training import Training
from tests.worker.helpers import digits_data, part_of
from tests.worker.jobs import Recorder, job, request_for
from tests.worker.loading.programs import exported
from tests.worker.structure.support import model_of
from tests.worker.test_run_compressed_tensors import bert, llama
from tests.worker.test_run_resize import BERT_WORDS, LAYERS, PICTURE, details, folder_request, resnet, with_texts
from worker.export.onnx import export_onnx
from worker.loading import load_model
from worker.run import run_job

pytestmark = pytest.mark.usefixtures("known_memory")

SPEC = {"task": "image-classification"}
BRANCHES = [
    "2.0.layers.4", "2.1.layers.4", "3.0.layers.4", "4.layers.0", "4.shortcut.0", "5.layers.4", "6.layers.4",
]  # fmt: skip


def rows(told: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in told["connections"]}


def few() -> Any:
    return part_of(digits_data(PICTURE), {"train": 100, "test": 30})


def test_an_architecture_comes_back_in_its_own_words(tmp_path: Path) -> None:
    step = Rewire(connections=4, samples=64, training=Training(epochs=1, lr=3e-3))
    formats = {"export": ("native", "packed", "pt2")}
    request = job(
        tmp_path / "job", resnet(), LAYERS, PICTURE, few(), (step, Finetune(training=step.training)), **formats
    )
    report = run_job(request, Recorder()).report
    told = details(report)
    assert list(rows(told)) == BRANCHES
    assert sum(row["cut"] for row in told["connections"]) == told["cut_connections"] == 4
    own = {one.format: one for one in report.artifacts}
    assert list(own) == ["native", "packed", "pt2"]
    for one in own.values():
        assert one.measurement.parameters == told["parameters"] < 0.8 * told["parameters_before"]
        assert one.measurement.metric == own["native"].measurement.metric is not None
    assert own["native"].measurement.macs == told["macs"] < told["macs_before"]
    native = request.output / own["native"].name
    again = load_model(native, native.name, json.loads(told["spec"]), tmp_path)
    assert "Identity" in told["spec"]
    x = torch.randn(3, *PICTURE)
    with torch.no_grad():
        program = torch.export.load(request.output / "program.pt2").module()
        assert torch.allclose(again.module(x), program(x), atol=1e-4)


def test_a_program_comes_back_smaller(tmp_path: Path) -> None:
    content = exported(resnet(), torch.randn(2, *PICTURE))
    step = Rewire(budget=Budget(macs=0.75), criterion="greedy", samples=8)
    request = request_for(tmp_path / "job", "up.pt2", content, SPEC, few(), (step,), export=("native",))
    report = run_job(request, Recorder()).report
    told = details(report)
    assert list(rows(told)) == BRANCHES
    assert told["macs_share"] <= 0.75
    (native,) = report.artifacts
    assert native.measurement.parameters == told["parameters"] < told["parameters_before"]
    assert native.measurement.size_bytes < len(content)
    cut = [name.rpartition(".layers.")[0] for name, row in rows(told).items() if row["cut"] and "shortcut" not in name]
    program = torch.export.load(request.output / native.name)
    assert not any(name.startswith(f"{path}.layers.") for path in cut for name in program.state_dict)
    assert program.module()(torch.randn(3, *PICTURE)).shape == (3, 10)


def test_an_onnx_graph_is_written_anew_and_goes_on_with_int8(tmp_path: Path) -> None:
    path = export_onnx(resnet(), model_of(resnet(), (torch.randn(2, *PICTURE),)), tmp_path / "m.onnx")
    step = Rewire(connections=2, criterion="taylor", samples=8, exclude=("2.*",))
    steps = (step, Quantize(method="static"))
    request = request_for(tmp_path / "job", "m.onnx", path.read_bytes(), SPEC, few(), steps, export=("onnx",))
    report = run_job(request, Recorder()).report
    (int8,) = report.artifacts
    assert {layer.bits for layer in int8.measurement.layers} == {8}
    told = details(report)
    assert told["cut_connections"] == 2
    assert not any(row["cut"] for name, row in rows(told).items() if name.startswith("2."))
    step = Rewire(connections=2, samples=16)
    request = request_for(tmp_path / "again", "m.onnx", path.read_bytes(), SPEC, few(), (step,), export=("native",))
    report = run_job(request, Recorder()).report
    (native,) = report.artifacts
    assert native.measurement.parameters == details(report)["parameters"] < details(report)["parameters_before"]
    assert native.measurement.size_bytes < path.stat().st_size
    assert load_model(request.output / native.name, native.name, SPEC, tmp_path).facts.trainable


def test_for_a_folder_a_program_stands_in(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    bert(tmp_path / "model")
    step = Rewire(connections=2, criterion="greedy", samples=4)
    request = with_texts(folder_request(tmp_path, (step,), ("native",)), tmp_path, vocabulary=BERT_WORDS)
    report = run_job(request, Recorder()).report
    told = details(report)
    cut = [name for name, row in rows(told).items() if row["cut"]]
    assert len(cut) == 2
    (program,) = report.artifacts
    assert program.format == "pt2"
    assert any("stands in" in warning for warning in report.warnings)
    assert program.measurement.parameters == told["parameters"]
    uploaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    for name in cut:
        layer = uploaded.get_submodule(name.removeprefix("model."))
        layer.register_forward_hook(lambda _, given, made: torch.zeros_like(made))
    ids = torch.arange(14).reshape(2, 7)
    names = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = uploaded(**names).logits
        given = torch.export.load(request.output / program.name).module()(*names.values())
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


def test_a_language_model_without_sublayers_is_trained(tmp_path: Path) -> None:
    llama(tmp_path / "model")
    step = Rewire(connections=1, samples=4, training=Training(epochs=2, lr=1e-3))
    request = folder_request(tmp_path, (step,), ("pt2",))
    request = with_texts(request, tmp_path, vocabulary=50)
    report = run_job(replace(request), Recorder()).report
    told = details(report)
    assert told["cut_connections"] == 1
    (program,) = report.artifacts
    assert program.measurement.parameters == told["parameters"] < told["parameters_before"]


def test_what_cannot_go_is_refused_with_the_reason(tmp_path: Path) -> None:
    layers = [{"type": "Flatten"}, {"type": "Linear", "in_features": 64, "out_features": 10}]
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(Unsupported, match="no sum of two ways"):
        run_job(job(tmp_path / "job", module, layers, PICTURE, few(), (Rewire(connections=1),)), Recorder())
