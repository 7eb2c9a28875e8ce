"""Jobs that deliver a packed artifact, on models of every kind."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

from app.contract.report import ArtifactReport, Report
from app.contract.spec import Prune
from tests.worker.jobs import LENET_LAYERS, Recorder, job, request_for
from tests.worker.loading.files import zipped
from tests.worker.test_run import SHAPE, few_digits
from worker.data.base import Data
from worker.model import Model
from worker.packed import load
from worker.request import RunRequest
from worker.run import run_job

pytestmark = pytest.mark.usefixtures("known_memory")

__all__ = ["few_digits"]
PRUNED = (Prune(sparsity=0.9),)


def done(request: RunRequest) -> tuple[Report, ArtifactReport, ArtifactReport]:
    report = run_job(request, Recorder()).report
    native, packed = report.artifacts
    assert (native.format, packed.format, packed.name) == ("native", "packed", "model.tsr")
    return report, native, packed


def test_a_pruned_network_has_a_smaller_file_with_the_same_weights(
    trained_lenet: Model, few_digits: Data, tmp_path: Path
) -> None:
    formats = {"export": ("native", "packed")}
    request = job(tmp_path / "job", trained_lenet.module, LENET_LAYERS, SHAPE, few_digits, PRUNED, **formats)
    _, native, packed = done(request)
    path = request.output / "model.tsr"
    state, expected = load(path), load_file(request.output / "model.safetensors")
    assert list(state) == list(trained_lenet.module.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert packed.measurement.size_bytes == path.stat().st_size < native.measurement.size_bytes / 6
    assert packed.measurement.metric == native.measurement.metric
    assert packed.measurement.nonzero_parameters == native.measurement.nonzero_parameters
    assert native.packed_bytes is None
    assert packed.packed_bytes is not None
    split = packed.packed_bytes.model_dump()
    assert sum(split.values()) == pytest.approx(path.stat().st_size)
    assert split["values"] > split["positions"] > split["codebooks"]
    bits = {layer.name: layer.bits for layer in packed.measurement.layers}
    assert 0 < bits["7.weight"] < 6
    assert all(0 < own < 33 for own in bits.values())


@pytest.mark.slow
def test_a_dense_network_is_packed_without_loss(trained_lenet: Model, tmp_path: Path) -> None:
    request = job(
        tmp_path / "job", trained_lenet.module, LENET_LAYERS, SHAPE, None, (Prune(sparsity=0.01),), export=("packed",)
    )
    report = run_job(request, Recorder()).report
    assert 1.05 < report.artifacts[0].size_ratio < 1.5
    assert not any("not smaller" in warning for warning in report.warnings)


def test_an_uploaded_graph_is_packed(lenet_float: Path, few_digits: Data, tmp_path: Path) -> None:
    request = request_for(
        tmp_path / "job",
        "model.onnx",
        lenet_float.read_bytes(),
        {"task": "image-classification"},
        few_digits,
        PRUNED,
        export=("native", "packed"),
    )
    _, native, packed = done(request)
    assert packed.measurement.runtime == "onnxruntime"
    assert packed.measurement.metric == native.measurement.metric
    stored = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(request.output / native.name).graph.initializer
    }
    unpacked = load(request.output / "model.tsr")
    sparse = next(name for name in unpacked if unpacked[name].numel() == 400 * 120)
    assert any((values == unpacked[sparse].numpy()).all() for values in stored.values() if values.size == 48_000)


def test_a_folder_of_transformers_is_packed_as_it_stores_its_weights(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100, num_labels=3
    )
    BertForSequenceClassification(config).half().save_pretrained(tmp_path / "bert")
    content = zipped({path.name: path.read_bytes() for path in (tmp_path / "bert").iterdir()})
    request = request_for(tmp_path / "job", "bert.zip", content, {}, None, PRUNED, export=("native", "packed"))
    _, native, packed = done(request)
    assert packed.measurement.runtime == "torch"
    assert packed.measurement.nonzero_parameters == native.measurement.nonzero_parameters
    state = load(request.output / "model.tsr")
    assert {tensor.dtype for tensor in state.values()} <= {torch.float16, torch.int64}
    original = load_file(tmp_path / "bert" / "model.safetensors")
    assert set(original) <= set(state)
    assert packed.size_ratio > 4
