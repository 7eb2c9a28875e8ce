"""Jobs that train for integers: what is delivered, what the report says of it, and what is refused."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from app.contract.cast import Cast
from app.contract.catalogue import check_order
from app.contract.codebook import Codebook
from app.contract.errors import DatasetMismatch, InvalidSpec, OrderRefused
from app.contract.pruning import Prune
from app.contract.qat import Qat
from app.contract.report import ArtifactReport, Report
from app.contract.spec import ExportFormat, Finetune, JobSpec, Step
from app.contract.training import Training
from tests.worker.helpers import digits_data, part_of
from tests.worker.jobs import LENET_LAYERS, Recorder, job, request_for
from tests.worker.loading.files import bert
from tests.worker.test_resuming import Attempts, Killed, same
from tests.worker.test_run import SHAPE, SMALL, recomputed
from worker.data.base import Data
from worker.model import Model
from worker.request import RunRequest
from worker.run import run_job
from worker.techniques.quantization.stored import stored_weights

pytestmark = pytest.mark.usefixtures("known_memory")

BRIEF = {"steps": 20, "lr": 1e-4, "distill": {}}


def qat(**fields: Any) -> Qat:
    return Qat.model_validate({"training": BRIEF} | fields)


@pytest.fixture(scope="module")
def few(mnist: Data) -> Data:
    return part_of(mnist, SMALL)


def lenet_job(folder: Path, trained: Model, data: Data | None, *steps: Step, **changes: Any) -> RunRequest:
    return job(folder / "job", trained.module, LENET_LAYERS, SHAPE, data, steps, **changes)


def by_format(report: Report) -> dict[str, ArtifactReport]:
    return {artifact.format: artifact for artifact in report.artifacts}


def test_eight_bits_are_in_the_onnx_file_and_as_accurate(trained_lenet: Model, few: Data, tmp_path: Path) -> None:
    asked = lenet_job(tmp_path, trained_lenet, few, qat(), export=("native", "onnx", "packed"))
    report = run_job(asked, Recorder()).report
    found = by_format(report)
    assert found["onnx"].size_ratio > 3
    assert {layer.bits for layer in found["onnx"].measurement.layers} == {8}
    # The weights lie on their grids before the file is made: what that cost is in the step's details.
    assert [layer.sqnr_db for layer in found["onnx"].measurement.layers] == [None] * 5
    metric, uploaded = found["onnx"].measurement.metric, report.uploaded.metric
    assert metric is not None
    assert uploaded is not None
    assert metric.value == pytest.approx(recomputed(asked.output / "model.onnx", few))
    assert metric.value >= uploaded.value - 0.01
    assert "model.safetensors is floating point; the int8 weights are in model.onnx." in report.warnings
    details = report.steps[0].details
    assert (details["method"], details["bits"], details["steps"]) == ("qat", 8, "learned")
    assert all(25 < row["sqnr_db"] < 60 for row in details["layers"])  # type: ignore[index, operator, union-attr]


@pytest.mark.slow
def test_a_program_of_torch_has_the_same_codes(trained_lenet: Model, few: Data, tmp_path: Path) -> None:
    asked = lenet_job(tmp_path, trained_lenet, few, qat(), export=("onnx", "pt2"))
    found = by_format(run_job(asked, Recorder()).report)
    graph, program = found["onnx"].measurement, found["pt2"].measurement
    assert {(layer.bits, layer.sqnr_db) for layer in program.layers} == {(8, None)}
    assert [layer.sparsity for layer in program.layers] == [layer.sparsity for layer in graph.layers]
    assert graph.metric is not None
    assert program.metric is not None
    assert abs(program.metric.value - graph.metric.value) <= 0.005


def test_four_bits_behind_pruning(trained_lenet: Model, few: Data, tmp_path: Path) -> None:
    steps = (Prune(sparsity=0.5), qat(bits=4, group_size=32))
    asked = lenet_job(tmp_path, trained_lenet, few, *steps, export=("native", "onnx", "packed"))
    report = run_job(asked, Recorder()).report
    found = by_format(report)
    bits = {layer.name: layer.bits for layer in found["onnx"].measurement.layers}
    assert {name: bits[name] for name in ("7.weight", "9.weight", "11.weight")} == dict.fromkeys(
        ("7.weight", "9.weight", "11.weight"), 4
    )
    assert all(layer.bits < 6 for layer in found["packed"].measurement.layers if layer.parameters > 5000)
    sparsity = {layer.name: layer.sparsity for layer in found["onnx"].measurement.layers}
    assert sum(sparsity[name] for name in bits) / len(bits) > 0.3
    assert found["packed"].size_ratio > 7
    told = [warning for warning in report.warnings if "as floats" in warning or "weights of few bits" in warning]
    assert any(warning.startswith("model.safetensors holds") for warning in told)


def ids_of(request: RunRequest, count: int = 8) -> RunRequest:
    """With rows of random tokens to train on."""
    path = request.model_path.with_name("ids.npz")
    ids = torch.randint(1, 10, (count, 8), generator=torch.Generator().manual_seed(0)).numpy()
    np.savez(path, **{"train_inputs.input_ids": ids, "train_inputs.attention_mask": np.ones_like(ids)})
    spec = request.spec.model_copy(update={"dataset": "dst_" + "0" * 26})
    return replace(request, dataset_path=path, dataset_filename="ids.npz", dataset_spec={}, spec=spec)


def bert_request(folder: Path, step: Step, export: tuple[ExportFormat, ...]) -> RunRequest:
    (folder / "model").mkdir()
    bert(folder / "model")
    path = folder / "bert.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in (folder / "model").iterdir():
            archive.write(file, file.name)
    return ids_of(request_for(folder / "job", "bert.zip", path.read_bytes(), {}, None, (step,), export=export))


@pytest.mark.slow
def test_a_transformer_trains_and_its_projections_share_a_range(tmp_path: Path) -> None:
    asked = bert_request(tmp_path, qat(training={"steps": 4, "batch_size": 4, "distill": {}}), ("native", "onnx"))
    report = run_job(asked, Recorder()).report
    rows = {row["name"]: row for row in report.steps[0].details["layers"]}  # type: ignore[union-attr]
    query, key = (
        next(row for name, row in rows.items() if name.endswith(f"0.attention.self.{part}.weight"))
        for part in ("query", "key")
    )
    assert (query["input_low"], query["input_high"]) == (key["input_low"], key["input_high"])
    stored = {weight.name: weight for weight in stored_weights(onnx.load(asked.output / "model.onnx"))}
    assert all(stored[name].bits == 8 for name in rows)


def test_four_bits_of_a_transformer_are_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    training = {"steps": 4, "batch_size": 4, "distill": {}}
    step = qat(bits=4, group_size=16, symmetric=True, training=training)
    asked = bert_request(tmp_path, step, ("native", "compressed-tensors"))
    run_job(asked, Recorder())
    outputs = []
    for name in ("model.zip", "model.compressed-tensors.zip"):
        folder = asked.scratch / name.removesuffix(".zip")
        with zipfile.ZipFile(asked.output / name) as archive:
            archive.extractall(folder)  # our own file
        with torch.no_grad():
            outputs.append(AutoModelForSequenceClassification.from_pretrained(folder)(torch.ones(1, 6).long()).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_job_that_was_killed_delivers_the_same_bytes(bits: int, tmp_path: Path) -> None:
    class Trained(Attempts):
        def request(self, folder: Path) -> RunRequest:
            training = {"epochs": 3, "lr": 1e-3, "checkpoint_steps": 3, "distill": {}}
            asked = super().request(folder)
            steps = (Finetune(training=Training(epochs=1)), qat(bits=bits, training=training))
            return replace(asked, spec=asked.spec.model_copy(update={"steps": steps, "export": ("native", "onnx")}))

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, killed = Trained(tmp_path / "whole"), Trained(tmp_path / "killed")
    expected = whole.run()
    with pytest.raises(Killed):
        killed.run(lambda step, times: step == "quantize" and times > 9)
    found = killed.run()
    assert same(found, expected)
    assert found[1][-1].details["training_resumed_at_step"] == 6
    assert found[0].ranges == expected[0].ranges


def test_what_cannot_be_is_refused_with_its_place(trained_lenet: Model, few: Data, tmp_path: Path) -> None:
    with pytest.raises(DatasetMismatch, match="`train` split"):
        run_job(lenet_job(tmp_path / "a", trained_lenet, None, qat()), Recorder())
    with pytest.raises(InvalidSpec, match="matches no layer") as pattern:
        run_job(lenet_job(tmp_path / "b", trained_lenet, few, qat(exclude=("nothing",))), Recorder())
    assert pattern.value.pointer == "/steps/0/exclude/0"
    with pytest.raises(InvalidSpec, match="exclude leaves nothing of 0, 3, 7") as every:
        run_job(lenet_job(tmp_path / "c", trained_lenet, few, qat(exclude=("*",))), Recorder())
    assert every.value.pointer == "/steps/0"


@pytest.mark.parametrize("step", [qat(), Cast(dtype="float8_e4m3")])
def test_a_pattern_for_a_norm_is_refused_in_words_for_the_step(step: Any, tmp_path: Path) -> None:
    layers: list[dict[str, Any]] = [
        {"type": "Linear", "in_features": 64, "out_features": 16},
        {"type": "BatchNorm1d", "num_features": 16},
        {"type": "Linear", "in_features": 16, "out_features": 10},
    ]
    module = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    step = step.model_copy(update={"exclude": ("1",)})
    asked = job(tmp_path / "job", module, layers, (64,), digits_data(), (step,), export=("native", "onnx"))
    with pytest.raises(InvalidSpec, match=r"'1' matches no layer that the step is for\. There are 0, 2") as refused:
        run_job(asked, Recorder())
    assert refused.value.pointer == "/steps/0"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"training": {"sharded": True, "processes": 2, "batch_size": 4}}, "leave sharded out"),
        ({"bits": 5}, "8, 4, 3 or 2"),
        ({"per_channel": False}, "Extra inputs"),
    ],
)
def test_fields_that_make_no_sense(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Qat.model_validate(fields)


@pytest.mark.parametrize(
    ("steps", "export", "pointer"),
    [
        ([{"technique": "quantize", "method": "qat"}], ["native"], "/export"),
        ([{"technique": "quantize", "method": "qat"}, {"technique": "prune", "sparsity": 0.5}], ["onnx"], "/steps/1"),
        ([Codebook().model_dump(), {"technique": "quantize", "method": "qat", "bits": 4}], ["onnx"], "/steps/1"),
        ([{"technique": "compress"}, {"technique": "quantize", "method": "weight_only"}], ["onnx"], "/steps/1"),
        ([{"technique": "quantize", "or_dynamic": True}], ["onnx", "pt2"], "/export"),
    ],
)
def test_orders_that_lose_something(steps: list[Any], export: list[str], pointer: str) -> None:
    from app.contract.recipes import resolve

    spec = JobSpec.model_validate({"model": "mdl_" + "0" * 26, "steps": steps, "export": export})
    with pytest.raises(OrderRefused) as refused:
        check_order(resolve(spec))
    assert refused.value.pointer == pointer
