"""Which of two files is the better one: the rule by hand, and real files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

from app.contract.errors import ExportFailed
from app.contract.spec import Quantize
from tests.worker.conftest import OnnxExport
from tests.worker.techniques.quantization.static.graphs import floats, graph_of
from worker.data.batch import Batch
from worker.evaluation.layers import sqnr_db
from worker.techniques.quantization.calibration import Samples
from worker.techniques.quantization.either import Tried, better, quantize_either
from worker.techniques.quantization.onnx_int8 import quantize_file

TOKENS, LONG = 100, 20


@pytest.mark.parametrize(
    ("static", "dynamic", "chosen", "why"),
    [
        ((11.8, 2.0), (25.7, 1.9), "dynamic", "dynamic is the nearer to the float model, and the faster."),
        ((20.6, 2.0), (17.6, 1.8), "static", "static is nearer to the float model by 3.0 dB and takes 1.11 times as"),
        ((20.6, 2.0), (17.6, 1.6), "dynamic", "3.0 dB and takes 1.25 times as long, for which dynamic is taken."),
        ((20.5, 2.0), (20.0, 1.9), "dynamic", "0.5 dB and takes 1.05 times as long, for which dynamic is taken."),
        ((-np.inf, 1.0), (20.0, 1.9), "dynamic", "dynamic alone gives finite numbers."),
        ((20.0, 1.9), (-np.inf, 1.0), "static", "static alone gives finite numbers."),
        ((20.0, 1.9, 100, True), (30.0, 1.0, 80, False), "static", "static alone holds the max_accuracy_drop."),
        ((20.0, 1.9, 80, True), (120.0, 1.0, 100, True), "static", "static takes 80% of the other's bytes."),
        ((20.0, 1.9, 98, True), (20.5, 1.0, 100, True), "dynamic", "dynamic is the faster."),
        ((20.0, 1.9, 98, False), (25.0, 1.0, 100, False), "dynamic", "dynamic is the nearer to the float model"),
    ],
)
def test_the_rule(static: tuple[Any, ...], dynamic: tuple[Any, ...], chosen: str, why: str) -> None:
    found, told = better({"static": Tried(*static), "dynamic": Tried(*dynamic)})
    assert found == chosen
    assert why in told


def outputs(path: Path, samples: Samples) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feed)[0] for feed in samples])


def test_both_are_measured_and_the_better_one_is_the_file(zoo: Callable[[str], OnnxExport], tmp_path: Path) -> None:
    torch.manual_seed(0)
    mask = torch.ones(8, LONG, dtype=torch.int64)
    batches = [Batch((torch.randint(0, TOKENS, (8, LONG)), mask), None) for _ in range(3)]
    samples = Samples(lambda: batches, ["input_ids", "attention_mask"], len(batches))
    source = tmp_path / "float.onnx"
    source.write_bytes(zoo("bert").path.read_bytes())
    target = tmp_path / "int8.onnx"
    step = Quantize(or_dynamic=True, calibration={"method": "minmax"}, rounding="nearest")  # type: ignore[arg-type]
    made = quantize_either(source, target, step, samples, ())
    rows = made.details["methods"]
    assert isinstance(rows, list)
    exact = outputs(source, samples)
    tried = {}
    for row in rows:
        method = str(row["method"])
        alone = tmp_path / f"{method}.onnx"
        quantize_file(source, alone, step.model_copy(update={"method": method}), samples, ())
        assert row["sqnr_db"] == pytest.approx(sqnr_db(exact, outputs(alone, samples)), abs=0.01)
        tried[method] = Tried(float(row["sqnr_db"] or 0), float(row["median_s"] or 0))
        assert row["size_bytes"] == alone.stat().st_size
    assert (made.details["method"], made.details["why"]) == better(tried)
    assert target.read_bytes() == (tmp_path / f"{made.details['method']}.onnx").read_bytes()
    assert ("calibrations" in made.details) == (made.details["method"] == "static")


def quotient(folder: Path, weight: np.ndarray) -> tuple[Path, Samples]:
    """Of what 8 bits of activations hold as 0."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "product"),
        helper.make_node("Div", ["m", "m"], ["y"], "quotient"),
    ]
    source = folder / "quotient.onnx"
    onnx.save_model(graph_of(nodes, {"w": weight}, ["n", 2], ["y"]), str(source))
    batch = Batch((torch.from_numpy(1 + np.abs(floats(8, 2))),), None)
    return source, Samples(lambda: [batch], ["x"], 1)


def test_where_one_fails_it_is_the_other(tmp_path: Path) -> None:
    source, samples = quotient(tmp_path, np.diag(np.array([1.0, 1e-6], np.float32)))
    made = quantize_either(source, tmp_path / "int8.onnx", Quantize(or_dynamic=True), samples, ())
    assert made.details["method"] == "dynamic"
    assert "Method static failed: In 8 bits the model gives what is no number" in str(made.details["why"])
    assert outputs(tmp_path / "int8.onnx", samples) == pytest.approx(1.0)


def test_where_both_fail_nothing_is_delivered(tmp_path: Path) -> None:
    source, samples = quotient(tmp_path, np.diag(np.array([1.0, 1e-6], np.float32)))
    step = Quantize(or_dynamic=True)
    with pytest.raises(ExportFailed):  # the only product stays a float, so that there is nothing to store
        quantize_either(source, tmp_path / "int8.onnx", step, samples, ("w",))
    assert not (tmp_path / "int8.onnx").exists()
