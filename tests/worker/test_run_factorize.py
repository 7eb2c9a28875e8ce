"""Jobs that factorize, on models of every kind: what is delivered loads without Tersor, and says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from app.contract.budgets import TimedBudget
from app.contract.errors import Unsupported
from app.contract.factorizing import Factorize
from app.contract.report import Report
from app.contract.spec import Prune, Quantize
from app.contract.training import Training
from tests.worker.jobs import LENET_LAYERS, Recorder, job, request_for
from tests.worker.loading.files import zipped
from tests.worker.loading.programs import exported
from tests.worker.test_run import SHAPE, few_digits
from tests.worker.test_run_compressed_tensors import llama
from tests.worker.test_run_program import lenet
from worker.data.base import Data
from worker.loading import load_model
from worker.model import Model
from worker.run import run_job

pytestmark = pytest.mark.usefixtures("known_memory")

__all__ = ["few_digits"]
SMALLER = Factorize(budget=TimedBudget(parameters=0.4), criterion="activations")


def details(report: Report, step: int = 0) -> dict[str, Any]:
    return report.steps[step].details


def test_an_architecture_comes_back_in_its_own_words(trained_lenet: Model, few_digits: Data, tmp_path: Path) -> None:
    training = Training(epochs=2, lr=1e-3)
    step = SMALLER.model_copy(update={"training": training})
    formats = {"export": ("native", "onnx", "packed", "pt2")}
    request = job(tmp_path / "job", trained_lenet.module, LENET_LAYERS, SHAPE, few_digits, (step,), **formats)
    report = run_job(request, Recorder()).report
    told = details(report)
    assert 0.36 < told["parameters_share"] <= 0.4
    own = {one.format: one for one in report.artifacts}
    assert list(own) == ["native", "onnx", "packed", "pt2"]
    for one in own.values():
        assert one.measurement.parameters == told["parameters"]
        assert one.measurement.metric is not None
        assert one.measurement.metric.value > 0.85
    assert own["native"].measurement.macs == told["macs"]
    native = request.output / own["native"].name
    again = load_model(native, native.name, json.loads(told["spec"]), tmp_path)
    assert sum(one.numel() for one in again.module.parameters()) == told["parameters"]
    program = torch.export.load(request.output / "program.pt2").module()
    x = torch.randn(3, *SHAPE)
    session = onnxruntime.InferenceSession(str(request.output / "model.onnx"))
    given = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        assert torch.allclose(again.module(x), program(x), atol=1e-4)
        assert torch.allclose(again.module(x), torch.from_numpy(given), atol=1e-4)


def test_it_composes_with_pruning_and_static_int8(trained_lenet: Model, few_digits: Data, tmp_path: Path) -> None:
    steps = (SMALLER, Prune(sparsity=0.5), Quantize(method="static"))
    request = job(
        tmp_path / "job", trained_lenet.module, LENET_LAYERS, SHAPE, few_digits, steps, export=("native", "onnx")
    )
    report = run_job(request, Recorder()).report
    native, int8 = report.artifacts
    assert details(report, 1)["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert native.measurement.nonzero_parameters < 0.6 * details(report)["parameters"]
    assert int8.measurement.size_bytes < native.measurement.size_bytes / 1.5
    assert {layer.bits for layer in int8.measurement.layers} == {8}


def test_an_uploaded_graph_is_written_anew(lenet_float: Path, few_digits: Data, tmp_path: Path) -> None:
    request = request_for(
        tmp_path / "job", "model.onnx", lenet_float.read_bytes(), {"task": "image-classification"}, few_digits,
        (SMALLER,), export=("native", "onnx"),
    )  # fmt: skip
    report = run_job(request, Recorder()).report
    native, converted = report.artifacts
    assert native.format == "native"
    assert native.measurement.parameters == converted.measurement.parameters < 0.42 * report.uploaded.parameters
    assert native.measurement.metric == converted.measurement.metric
    again = load_model(request.output / native.name, native.name, {"task": "image-classification"}, tmp_path)
    assert again.facts.trainable


def test_a_program_is_written_anew(few_digits: Data, tmp_path: Path) -> None:
    content = exported(lenet().eval(), torch.randn(2, *SHAPE))
    spec, formats = {"task": "image-classification"}, {"export": ("native", "packed")}
    request = request_for(tmp_path / "job", "upload.pt2", content, spec, few_digits, (SMALLER,), **formats)
    report = run_job(request, Recorder()).report
    native, packed = report.artifacts
    assert native.measurement.parameters == packed.measurement.parameters == details(report)["parameters"]
    assert details(report)["parameters_share"] <= 0.4
    program = torch.export.load(request.output / native.name).module()
    assert program(torch.randn(5, *SHAPE)).shape == (5, 10)


def test_a_config_has_no_words_for_products_and_a_program_stands_in(tmp_path: Path) -> None:
    llama(tmp_path / "model")
    content = zipped({path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
    step = Factorize(budget=TimedBudget(parameters=0.8))
    request = request_for(tmp_path / "job", "model.zip", content, {}, None, (step,), export=("native", "onnx"))
    result = run_job(request, Recorder())
    assert [(one.format, one.path.name) for one in result.artifacts] == [("pt2", "program.pt2"), ("onnx", "model.onnx")]
    assert any("program.pt2 stands in" in warning for warning in result.report.warnings)
    program = torch.export.load(result.artifacts[0].path).module()
    session = onnxruntime.InferenceSession(str(result.artifacts[1].path))
    for length in (4, 9):  # the sequence is still open
        ids = torch.arange(2 * length).reshape(2, length) % 32
        inputs = [ids, torch.ones_like(ids)][: len(session.get_inputs())]
        names = [one.name for one in session.get_inputs()]
        given = session.run(None, {name: own.numpy() for name, own in zip(names, inputs, strict=True)})[0]
        with torch.no_grad():
            assert torch.allclose(program(*inputs), torch.from_numpy(given), atol=1e-4)
    for format in ("packed", "compressed-tensors"):
        refused = request_for(tmp_path / format, "model.zip", content, {}, None, (step,), export=(format,))
        with pytest.raises(Unsupported, match="no words for layers"):
            run_job(refused, Recorder())


def test_every_weight_keeps_the_dtype_that_it_came_in(few_digits: Data, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    layers = [
        {"type": "Flatten"}, {"type": "Linear", "in_features": 784, "out_features": 64},
        {"type": "BatchNorm1d", "num_features": 64}, {"type": "ReLU"},
        {"type": "Linear", "in_features": 64, "out_features": 10},
    ]  # fmt: skip
    for place in (1, 4):
        module[place].half()
    step = Factorize(budget=TimedBudget(bytes=0.5))
    request = job(tmp_path / "job", module.eval(), layers, SHAPE, few_digits, (step,), export=("native",))
    report = run_job(request, Recorder()).report
    assert report.artifacts[0].measurement.size_bytes < 0.55 * report.uploaded.size_bytes
    state = load_file(request.output / report.artifacts[0].name)
    assert {own.dtype for name, own in state.items() if name.startswith("1.")} == {torch.float16}
    assert state["2.weight"].dtype == torch.float32


def test_nothing_to_take_apart_is_refused(few_digits: Data, tmp_path: Path) -> None:
    layers = [{"type": "Flatten"}, {"type": "TransformerEncoderLayer", "d_model": 784, "nhead": 2,
               "dim_feedforward": 8, "batch_first": True}]  # fmt: skip
    module = nn.Sequential(nn.Flatten(), nn.TransformerEncoderLayer(784, 2, 8, batch_first=True))
    with pytest.raises(Unsupported, match="no layer of its own"):
        run_job(job(tmp_path / "job", module, layers, SHAPE, None, (Factorize(energy=0.5),)), Recorder())
