"""Whole jobs on a LeNet-5 and real digits, and on the worked example of the literature."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import nn

from app.contract.automatic import Automatic
from app.contract.calibration import Calibration
from app.contract.errors import DatasetMismatch, ExportFailed, Unsupported
from app.contract.report import ArtifactReport, Report
from app.contract.spec import Finetune, Prune, Quantize, Step
from app.contract.training import Training
from tests.worker.helpers import MemorySplit, context_for, digits_data, memory_data, mlp, part_of, tiny_model
from tests.worker.jobs import EXAMPLE_LAYERS, LENET_LAYERS, Recorder, job, steps_of
from tests.worker.nets import LENET_MACS, lenet
from worker.data.base import Data
from worker.export.registry import _samples
from worker.model import Model
from worker.request import RunRequest, RunResult
from worker.run import EXPORT_FROM, VERIFY_FROM, run_job

SHAPE = (1, 28, 28)
SMALL = {"train": 512, "validation": 100, "test": 500, "calibration": 64}
BRIEF: dict[str, Any] = {"steps": 30}


@pytest.fixture(scope="module")
def few_digits(mnist: Data) -> Data:
    """A part of the digits, so that a job takes seconds."""
    return part_of(mnist, SMALL)


@pytest.fixture(scope="module")
def small(
    trained_lenet: Model, few_digits: Data, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunRequest, RunResult, Recorder]:
    """The recipe `small`: prune with distillation, fine-tune, quantize."""
    recorder = Recorder()
    folder = tmp_path_factory.mktemp("small") / "job"
    request = job(folder, trained_lenet.module, LENET_LAYERS, SHAPE, few_digits, steps_of("small", **BRIEF))
    return request, run_job(request, recorder), recorder


def artifact(report: Report, format: str) -> ArtifactReport:
    return next(one for one in report.artifacts if one.format == format)


def recomputed(path: Path, data: Data) -> float:
    """Accuracy on the test split, without any of the code under test."""
    split = data.splits["test"]
    assert isinstance(split, MemorySplit)
    assert split.targets is not None
    if path.suffix == ".onnx":
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        logits = session.run(None, {"input": split.inputs.numpy()})[0]
    else:
        module = lenet()
        module.load_state_dict(load_file(path))
        with torch.no_grad():
            logits = module.eval()(split.inputs).numpy()
    return float(np.mean(logits.argmax(1) == split.targets.numpy()))


def test_figures_are_those_of_the_delivered_files(
    small: tuple[RunRequest, RunResult, Recorder], few_digits: Data
) -> None:
    request, result, _ = small
    assert [(one.name, one.format) for one in result.artifacts] == [
        ("model.safetensors", "native"),
        ("model.onnx", "onnx"),
    ]
    for file, reported in zip(result.artifacts, result.report.artifacts, strict=True):
        assert file.path.parent == request.output
        assert reported.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()
        assert reported.measurement.size_bytes == file.path.stat().st_size
        metric = reported.measurement.metric
        assert metric is not None
        assert (metric.split, metric.samples) == ("test", 500)
        assert metric.value == pytest.approx(recomputed(file.path, few_digits), abs=1e-9)
        assert reported.measurement.macs == LENET_MACS
    uploaded = result.report.uploaded
    assert uploaded.metric is not None
    assert uploaded.metric.value == pytest.approx(recomputed(request.model_path, few_digits), abs=1e-9)
    assert (uploaded.parameters, uploaded.macs, uploaded.runtime) == (61_706, LENET_MACS, "torch")
    assert sorted(p.name for p in request.output.iterdir()) == ["model.onnx", "model.safetensors"]


def test_small_is_sparse_int8_and_nearly_as_accurate(small: tuple[RunRequest, RunResult, Recorder]) -> None:
    _, result, _ = small
    onnx_report = artifact(result.report, "onnx")
    assert onnx_report.size_ratio > 3.3
    assert onnx_report.metric_change is not None
    assert onnx_report.metric_change > -0.05
    for one in result.report.artifacts:
        weights = [layer for layer in one.measurement.layers if len(layer.shape) > 1]
        zeros = sum(layer.sparsity * layer.parameters for layer in weights)
        assert zeros / sum(layer.parameters for layer in weights) >= 0.799
        assert one.measurement.peak_memory_bytes > 0
    assert {layer.bits for layer in onnx_report.measurement.layers} == {8}
    assert all((layer.sqnr_db or 0) > 20 for layer in onnx_report.measurement.layers)
    assert {layer.bits for layer in artifact(result.report, "native").measurement.layers} == {32}


def test_report_says_how_it_came_about(small: tuple[RunRequest, RunResult, Recorder]) -> None:
    request, result, recorder = small
    report = result.report
    assert [step.technique for step in report.steps] == ["prune", "finetune", "quantize"]
    assert all(step.seconds >= 0 for step in report.steps)
    assert set(report.seconds) == {"load", "steps", "export", "verify", "measure"}
    assert report.spec == request.spec
    assert report.uploaded_sha256 == request.model_sha256
    assert report.environment.threads == request.threads
    assert {"torch", "onnx", "onnxruntime", "transformers", "numpy"} <= set(report.environment.libraries)
    assert {one.measurement.latency.threads for one in report.artifacts} == {request.threads}
    assert any("zeros in a dense file" in warning for warning in report.warnings)
    assert any("int8 weights are in model.onnx" in warning for warning in report.warnings)
    shares = [share for share, _ in recorder.said]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    stages = list(dict.fromkeys(name for _, name in recorder.said))
    assert stages == ["load", "prune", "finetune", "quantize", "export", "verify", "measure"]
    assert Report.model_validate_json(report.model_dump_json()) == report
    exporting = {share for share, name in recorder.said if name == "export"}
    assert len(exporting) > 10  # calibration goes through its samples several times
    assert EXPORT_FROM <= min(exporting) < max(exporting) <= VERIFY_FROM


def test_int8_needs_only_calibration_data(trained_lenet: Model, few_digits: Data, tmp_path: Path) -> None:
    calibration = few_digits.splits["calibration"]
    assert isinstance(calibration, MemorySplit)
    data = memory_data({"calibration": (calibration.inputs, None)})
    request = job(tmp_path / "job", trained_lenet.module, LENET_LAYERS, SHAPE, data, steps_of("int8"), export=("onnx",))
    report = run_job(request, Recorder()).report
    (one,) = report.artifacts
    assert one.measurement.metric is None
    assert one.metric_change is None
    assert any("The accuracy was not measured" in warning for warning in report.warnings)
    assert recomputed(request.output / "model.onnx", few_digits) > 0.9
    assert one.size_ratio > 3.3


def test_sparse_gives_float_files_of_the_same_weights(trained_lenet: Model, few_digits: Data, tmp_path: Path) -> None:
    steps = steps_of("sparse", **BRIEF)
    request = job(tmp_path / "job", trained_lenet.module, LENET_LAYERS, SHAPE, few_digits, steps)
    report = run_job(request, Recorder()).report
    native = load_file(request.output / "model.safetensors")
    stored = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(request.output / "model.onnx").graph.initializer
    }
    for name in ("0.weight", "7.weight", "11.weight"):
        np.testing.assert_array_equal(native[name].numpy(), stored[name])
    onnx_metric = artifact(report, "onnx").measurement.metric
    assert onnx_metric == artifact(report, "native").measurement.metric
    assert artifact(report, "onnx").measurement.parameters == 61_706


@pytest.mark.slow
def test_worked_example_of_the_literature(tmp_path: Path) -> None:
    """Digits of 8x8 on three channels; the recipe's ten epochs cut short."""
    digits = digits_data((1, 8, 8))
    sizes = {"train": 320, "test": 200}
    splits = {}
    for name, size in sizes.items():
        split = digits.splits[name]
        assert isinstance(split, MemorySplit)
        splits[name] = (
            split.inputs[:size].repeat(1, 3, 1, 1),
            split.targets[:size] if split.targets is not None else None,
        )
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    steps = steps_of("threshold-int8", steps=60, lr=5e-3)
    request = job(tmp_path / "job", module, EXAMPLE_LAYERS, (3, 8, 8), memory_data(splits), steps)
    report = run_job(request, Recorder()).report
    one = artifact(report, "onnx")
    assert one.size_ratio > 3.3
    assert {layer.bits for layer in one.measurement.layers} == {8}
    assert one.measurement.nonzero_parameters < 0.85 * report.uploaded.nonzero_parameters
    metric = one.measurement.metric
    assert metric is not None
    assert report.uploaded.metric is not None
    assert metric.value > report.uploaded.metric.value + 0.1  # it came untrained
    assert report.uploaded.macs == 8 * 8 * (3 * 64 * 9 + 64 * 128 * 9) + 128 * 10


def test_same_seed_same_files(
    small: tuple[RunRequest, RunResult, Recorder], trained_lenet: Model, few_digits: Data, tmp_path: Path
) -> None:
    steps = steps_of("small", **BRIEF)
    request = job(tmp_path / "again", trained_lenet.module, LENET_LAYERS, SHAPE, few_digits, steps, export=("onnx",))
    run_job(request, Recorder())
    first = artifact(small[1].report, "onnx").sha256
    assert hashlib.sha256((request.output / "model.onnx").read_bytes()).hexdigest() == first


def refused(trained_lenet: Model, data: Data | None, steps: tuple[Step, ...], folder: Path) -> Recorder:
    recorder = Recorder()
    run_job(job(folder / "job", trained_lenet.module, LENET_LAYERS, SHAPE, data, steps), recorder)
    return recorder


def test_what_cannot_work_is_refused_before_anything_is_computed(trained_lenet: Model, tmp_path: Path) -> None:
    steps: tuple[Step, ...] = (Prune(sparsity=0.5), Quantize(method="static"))
    with pytest.raises(DatasetMismatch, match="names no dataset"):
        refused(trained_lenet, None, steps, tmp_path / "a")
    nothing: tuple[Step, ...] = (Prune(sparsity=0.5), Quantize(method="dynamic", exclude=("*",)))
    with pytest.raises(Unsupported, match="leaves no layer to quantize") as caught:
        refused(trained_lenet, None, nothing, tmp_path / "b")
    assert caught.value.pointer == "/steps/1"


@pytest.mark.slow
def test_dynamic_without_any_data_says_what_stays_float(trained_lenet: Model, tmp_path: Path) -> None:
    request = job(
        tmp_path / "job",
        trained_lenet.module,
        LENET_LAYERS,
        SHAPE,
        None,
        (Quantize(method="dynamic"),),
        export=("onnx",),
    )
    report = run_job(request, Recorder()).report
    assert any("left 2 convolutions in floating point" in warning for warning in report.warnings)
    assert report.artifacts[0].measurement.macs == LENET_MACS


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_upload_trains(
    dtype: torch.dtype, trained_lenet: Model, few_digits: Data, tmp_path: Path
) -> None:
    half = copy.deepcopy(trained_lenet.module).to(dtype)
    steps = (Finetune(training=Training(steps=5)),)
    request = job(tmp_path / "job", half, LENET_LAYERS, SHAPE, few_digits, steps)
    report = run_job(request, Recorder()).report
    native = load_file(request.output / "model.safetensors")
    assert {tensor.dtype for tensor in native.values()} == {dtype}
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(request.output / "model.onnx").graph.initializer}
    np.testing.assert_array_equal(native["7.weight"].float().numpy(), stored["7.weight"])
    assert {layer.bits for layer in artifact(report, "native").measurement.layers} == {16}


def test_what_no_onnx_file_can_hold_is_refused_before_the_steps(
    trained_lenet: Model, few_digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.export.onnx.MAX_BYTES", 61_706 * 4 - 1)
    request = job(tmp_path / "job", trained_lenet.module, LENET_LAYERS, SHAPE, few_digits, steps_of("sparse", **BRIEF))
    recorder = Recorder()
    with pytest.raises(ExportFailed, match="Export native instead"):
        run_job(request, recorder)
    assert {name for _, name in recorder.said} == {"load"}


def test_calibration_draws_from_all_of_a_sorted_split(tmp_path: Path) -> None:
    inputs = torch.arange(10.0).repeat_interleave(30)[:, None].repeat(1, 64)
    context = context_for(tiny_model(mlp()), memory_data({"calibration": (inputs, None)}), tmp_path)
    samples = _samples(context, Quantize(calibration=Calibration(samples=64)))
    assert samples is not None
    drawn = [value for batch in samples for value in batch["input"][:, 0].tolist()]
    assert len(drawn) == 64
    assert set(drawn) == set(range(10))


def test_a_job_finds_its_own_settings_and_reports_the_way(few_digits: Data, tmp_path: Path) -> None:
    training = Training.model_validate({"epochs": 3} | dict.fromkeys(("optimizer", "lr", "batch_size"), "auto"))
    step = Finetune(training=training)
    request = job(tmp_path / "job", lenet(), LENET_LAYERS, SHAPE, few_digits, (step,), export=("native",))
    report = Report.model_validate_json(run_job(request, Recorder()).report.model_dump_json())
    details = report.steps[0].details
    assert {"race", "lr_range_test_adamw", "lr_range_test_sgd", "batch_sizes"} <= set(details)
    assert details["found_optimizer"] in ("adamw", "sgd")
    delivered = artifact(report, "native").measurement.metric
    assert delivered is not None
    assert report.uploaded.metric is not None
    assert delivered.value > report.uploaded.metric.value + 0.3  # the upload has random weights


def test_method_auto_is_what_fits_and_says_why(trained_lenet: Model, few_digits: Data, tmp_path: Path) -> None:
    request = job(tmp_path / "job", trained_lenet.module, LENET_LAYERS, SHAPE, few_digits, (Automatic(target="arm"),))
    report = Report.model_validate_json(run_job(request, Recorder()).report.model_dump_json())
    details = report.steps[0].details
    assert (details["target"], details["method"]) == ("arm", "static")
    assert "int8 activations" in str(details["why"])
    assert details["activations"] == "int8"
    assert report.spec.steps == (Automatic(target="arm"),)
    assert any("floating point; the int8 weights are in model.onnx" in warning for warning in report.warnings)
    assert all(layer.bits == 8 for layer in artifact(report, "onnx").measurement.layers)
