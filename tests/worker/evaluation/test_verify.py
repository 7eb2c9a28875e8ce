from __future__ import annotations

import functools
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper

from app.contract.errors import ArtifactUnverified
from tests.worker.helpers import digits_data
from worker.data.base import Data
from worker.data.feed import Feed
from worker.evaluation.artifact import OnnxFile
from worker.evaluation.verify import SAMPLES, check_samples, verify
from worker.export.registry import Exported
from worker.model import Model


def reload(model: Model, exported: Exported) -> OnnxFile:
    assert exported.reference is not None
    return OnnxFile(exported.path, exported.reference, model.facts, 1)


def as_exported(path: Path, reference: Path) -> Exported:
    return Exported(path, "onnx", "application/octet-stream", reference)


def tampered(source: Path, target: Path, value: float) -> Path:
    """The file with one bias of the last layer replaced."""
    proto = onnx.load(source)
    for tensor in proto.graph.initializer:
        if tensor.name == "11.bias":
            bias = numpy_helper.to_array(tensor).copy()
            bias[3] = value
            tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
    onnx.save_model(proto, str(target))
    return target


def test_good_files_pass(trained_lenet: Model, lenet_float: Path, lenet_int8: Path, mnist: Data) -> None:
    samples = check_samples(trained_lenet, Feed(trained_lenet, mnist))
    assert len(samples[0]) == SAMPLES
    for path in (lenet_float, lenet_int8):
        loaded = verify(
            as_exported(path, lenet_float), trained_lenet.module, samples, functools.partial(reload, trained_lenet)
        )
        assert loaded(samples).shape == (SAMPLES, 10)


@pytest.mark.parametrize(("value", "sentence"), [(50.0, "outputs differ"), (float("nan"), "outputs differ")])
def test_a_changed_weight_is_seen(
    value: float, sentence: str, trained_lenet: Model, lenet_float: Path, tmp_path: Path
) -> None:
    path = tampered(lenet_float, tmp_path / "model.onnx", value)
    with pytest.raises(ArtifactUnverified, match=sentence):
        verify(
            as_exported(path, path),
            trained_lenet.module,
            check_samples(trained_lenet, None),
            functools.partial(reload, trained_lenet),
        )


def test_an_int8_file_is_judged_by_the_float_file_that_it_was_made_from(
    trained_lenet: Model, lenet_float: Path, lenet_int8: Path, tmp_path: Path
) -> None:
    other = tampered(lenet_float, tmp_path / "float.onnx", 50.0)
    with pytest.raises(ArtifactUnverified, match="outputs differ"):
        verify(
            as_exported(lenet_int8, other),
            trained_lenet.module,
            check_samples(trained_lenet, None),
            functools.partial(reload, trained_lenet),
        )


def test_bytes_that_do_not_load(trained_lenet: Model, lenet_float: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(lenet_float.read_bytes()[:5000])
    with pytest.raises(ArtifactUnverified, match="does not load in ONNX Runtime"):
        OnnxFile(path, path, trained_lenet.facts, 1)


def test_samples_are_real_where_there_are_any(trained_lenet: Model) -> None:
    data = digits_data((64,))
    samples = check_samples(trained_lenet, Feed(trained_lenet, data))
    torch.testing.assert_close(samples[0], next(iter(Feed(trained_lenet, data).batches("test", SAMPLES))).inputs[0])
