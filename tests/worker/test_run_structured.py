"""Jobs that take units out, on models of every kind: what is delivered loads without Tersor, and says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from app.contract.budgets import TimedBudget
from app.contract.errors import InvalidSpec
from app.contract.report import Report
from app.contract.spec import Quantize
from app.contract.structured import StructuredPrune
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
SMALLER = StructuredPrune(budget=TimedBudget(macs=0.5), criterion="activations", round_to=2)


def details(report: Report, step: int = 0) -> dict[str, Any]:
    return report.steps[step].details


def test_an_architecture_comes_back_in_its_own_words(trained_lenet: Model, few_digits: Data, tmp_path: Path) -> None:
    step = SMALLER.model_copy(update={"training": Training(epochs=2, lr=1e-3)})
    formats = {"export": ("native", "onnx", "packed", "pt2")}
    request = job(tmp_path / "job", trained_lenet.module, LENET_LAYERS, SHAPE, few_digits, (step,), **formats)
    report = run_job(request, Recorder()).report
    told = details(report)
    assert 0.48 < told["macs_share"] <= 0.5
    own = {one.format: one for one in report.artifacts}
    assert list(own) == ["native", "onnx", "packed", "pt2"]
    for one in own.values():
        assert one.measurement.parameters == told["parameters"]
        assert one.measurement.metric is not None
        assert one.measurement.metric.value > 0.85
    assert own["native"].measurement.macs == told["macs"]
    native = request.output / own["native"].name
    again = load_model(native, native.name, json.loads(told["spec"]), tmp_path)
    x = torch.randn(3, *SHAPE)
    session = onnxruntime.InferenceSession(str(request.output / "model.onnx"))
    given = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        assert torch.allclose(again.module.eval()(x), torch.from_numpy(given), atol=1e-4)


def test_it_goes_on_with_int8(trained_lenet: Model, few_digits: Data, tmp_path: Path) -> None:
    steps = (SMALLER, Quantize(method="static"))
    request = job(tmp_path / "job", trained_lenet.module, LENET_LAYERS, SHAPE, few_digits, steps, export=("onnx",))
    (int8,) = run_job(request, Recorder()).report.artifacts
    assert {layer.bits for layer in int8.measurement.layers} == {8}


def test_an_uploaded_graph_is_written_anew(lenet_float: Path, few_digits: Data, tmp_path: Path) -> None:
    request = request_for(
        tmp_path / "job", "model.onnx", lenet_float.read_bytes(), {"task": "image-classification"}, few_digits,
        (SMALLER,), export=("native", "onnx"),
    )  # fmt: skip
    report = run_job(request, Recorder()).report
    native, converted = report.artifacts
    assert native.measurement.parameters == converted.measurement.parameters == details(report)["parameters"]
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
    program = torch.export.load(request.output / native.name).module()
    assert program(torch.randn(5, *SHAPE)).shape == (5, 10)


def test_layers_of_sizes_of_their_own_are_a_program(tmp_path: Path) -> None:
    llama(tmp_path / "model")
    content = zipped({path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
    step = StructuredPrune(budget=TimedBudget(parameters=0.7))
    request = request_for(tmp_path / "job", "model.zip", content, {}, None, (step,), export=("native", "onnx"))
    result = run_job(request, Recorder())
    assert [(one.format, one.path.name) for one in result.artifacts] == [("pt2", "program.pt2"), ("onnx", "model.onnx")]
    program = torch.export.load(result.artifacts[0].path).module()
    session = onnxruntime.InferenceSession(str(result.artifacts[1].path))
    for length in (4, 9):  # the sequence is still open
        ids = torch.arange(2 * length).reshape(2, length) % 32
        inputs = [ids, torch.ones_like(ids)][: len(session.get_inputs())]
        names = [one.name for one in session.get_inputs()]
        given = session.run(None, {name: own.numpy() for name, own in zip(names, inputs, strict=True)})[0]
        with torch.no_grad():
            assert torch.allclose(program(*inputs), torch.from_numpy(given), atol=1e-4)


def test_a_budget_out_of_reach_says_what_is_in_reach(trained_lenet: Model, few_digits: Data, tmp_path: Path) -> None:
    step = StructuredPrune(budget=TimedBudget(macs=0.01), keep_at_least=0.5)
    with pytest.raises(InvalidSpec, match=r"With the fewest units .* are left"):
        run_job(job(tmp_path / "job", trained_lenet.module, LENET_LAYERS, SHAPE, few_digits, (step,)), Recorder())
