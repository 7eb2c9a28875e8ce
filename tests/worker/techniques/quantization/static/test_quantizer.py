"""Whole files: what is tried and chosen, what stays floating point, and what the report holds weights against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

from app.contract.errors import ExportFailed
from app.contract.spec import Calibration, Quantize
from tests.worker.conftest import OnnxExport
from tests.worker.techniques.quantization.static.graphs import floats, graph_of
from worker.data.base import Data
from worker.data.batch import Batch
from worker.data.feed import Feed
from worker.evaluation.layers import graph_layers, sqnr_db
from worker.model import Model
from worker.techniques.quantization.calibration import Samples
from worker.techniques.quantization.int8_graph import Int8Graph
from worker.techniques.quantization.onnx_int8 import quantize_file

TOKENS = 100


def outputs(path: Path, samples: Samples) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feed)[0] for feed in samples])


def digits(model: Model, mnist: Data) -> Samples:
    feed = Feed(model, mnist)
    return Samples(lambda: feed.batches("calibration", 16, limit=64), ["input"], 4)


def sentences() -> Samples:
    torch.manual_seed(0)
    batches = [Batch((torch.randint(0, TOKENS, (8, 20)), torch.ones(8, 20, dtype=torch.int64)), None) for _ in range(4)]
    return Samples(lambda: batches, ["input_ids", "attention_mask"], len(batches))


def made(source: Path, folder: Path, samples: Samples, **fields: object) -> tuple[Path, Int8Graph]:
    target = folder / f"{len(list(folder.iterdir()))}.onnx"
    return target, quantize_file(source, target, Quantize.model_validate(fields), samples, ())


def test_auto_takes_the_best_of_what_it_tries(
    trained_lenet: Model, lenet_float: Path, mnist: Data, tmp_path: Path
) -> None:
    samples = digits(trained_lenet, mnist)
    path, found = made(lenet_float, tmp_path, samples)
    tried = found.details["calibrations"]
    assert isinstance(tried, list)
    assert [one["method"] for one in tried] == ["minmax", "percentile", "mse"]
    exact = outputs(lenet_float, samples)
    for one in tried:
        alone, other = made(lenet_float, tmp_path, samples, calibration={"method": one["method"]})
        assert one["sqnr_db"] == pytest.approx(sqnr_db(exact, outputs(alone, samples)), abs=0.01)
        assert other.details["calibration_method"] == one["method"]
        assert other.details["calibrations"] == [one]
    best = max(tried, key=lambda one: float(one["sqnr_db"] or 0))
    assert found.details["calibration_method"] == best["method"]
    assert sqnr_db(exact, outputs(path, samples)) == pytest.approx(best["sqnr_db"], abs=0.01)


def test_adaptive_rounding_is_nearer_to_the_float_model(
    trained_lenet: Model, lenet_float: Path, mnist: Data, tmp_path: Path
) -> None:
    samples = digits(trained_lenet, mnist)
    exact = outputs(lenet_float, samples)
    noise = {
        rounding: sqnr_db(exact, outputs(made(lenet_float, tmp_path, samples, rounding=rounding)[0], samples))
        for rounding in ("nearest", "adaptive")
    }
    assert noise["adaptive"] > noise["nearest"] + 0.5


def test_what_products_of_a_transformer_give_stays_floating_point(
    zoo: Callable[[str], OnnxExport], tmp_path: Path
) -> None:
    path, _ = made(zoo("bert").path, tmp_path, sentences())
    graph = onnx.load(path).graph
    products = {name for node in graph.node if node.op_type in ("MatMul", "Gemm") for name in node.output}
    assert products
    quantized = [node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    sums = {name for node in graph.node if node.op_type == "Add" for name in node.output}
    assert not {name for name in quantized if name in products and name not in sums}


def outlying(folder: Path) -> tuple[Path, Samples]:
    """Two products behind a sum, one of whose channels reaches a hundred times as far as the others."""
    nodes = [
        helper.make_node("Add", ["x", "s"], ["h"], "sum"),
        helper.make_node("MatMul", ["h", "first.weight"], ["a"], "first"),
        helper.make_node("LayerNormalization", ["a", "g"], ["n"], "norm"),
        helper.make_node("MatMul", ["n", "second.weight"], ["y"], "second"),
    ]
    shift = floats(16)
    given = {"s": shift, "g": np.ones(16, np.float32), "first.weight": floats(16, 16), "second.weight": floats(16, 4)}
    given["first.weight"][5] /= 100
    path = folder / "outlying.onnx"
    onnx.save_model(graph_of(nodes, given, ["n", 16], ["y"]), str(path))
    values = floats(64, 16)
    values[:, 5] *= 100
    batches = [Batch((torch.from_numpy(value),), None) for value in np.split(values, 4)]
    return path, Samples(lambda: batches, ["x"], len(batches))


def test_smoothing_where_it_betters_the_whole(tmp_path: Path) -> None:
    source, samples = outlying(tmp_path)
    exact = outputs(source, samples)
    path, found = made(source, tmp_path, samples)
    rows = found.details["smoothed"]
    assert isinstance(rows, list)
    assert rows[0]["tensor"] == "h"
    # The integers stand for weights that took the factors up: against the upload's own they would look like noise.
    layers = {layer.name: layer for layer in graph_layers(onnx.load(path), onnx.load(found.floats))}
    assert (layers["first.weight"].sqnr_db or 0) > 25
    np.testing.assert_allclose(outputs(found.floats, samples), exact, atol=1e-4 * np.abs(exact).max())
    without, other = made(source, tmp_path, samples, smooth=False)
    assert "smoothed" not in other.details
    assert sqnr_db(exact, outputs(path, samples)) > sqnr_db(exact, outputs(without, samples)) + 3


def test_no_factors_where_they_better_nothing(
    trained_lenet: Model, lenet_float: Path, mnist: Data, tmp_path: Path
) -> None:
    _, found = made(lenet_float, tmp_path, digits(trained_lenet, mnist))
    assert found.details["smoothed"] == []


def test_what_becomes_no_number_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Log", ["x"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"], "product")]
    source = tmp_path / "log.onnx"
    onnx.save_model(graph_of(nodes, {"w": floats(4, 4)}, ["n", 4], ["y"]), str(source))
    samples = Samples(lambda: [Batch((-torch.ones(2, 4),), None)], ["x"], 1)
    with pytest.raises(ExportFailed, match=r"'h' becomes what is no number \(NaN\)"):
        quantize_file(source, tmp_path / "q.onnx", Quantize(), samples, ())
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("method", ["auto", "minmax"])
def test_a_file_that_gives_no_numbers_is_not_delivered(method: str, tmp_path: Path) -> None:
    """A quotient of what 8 bits hold as 0."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "product"),
        helper.make_node("Div", ["m", "m"], ["y"], "quotient"),
    ]
    source = tmp_path / "quotient.onnx"
    weight = np.diag(np.array([1.0, 1e-6], np.float32))
    onnx.save_model(graph_of(nodes, {"w": weight}, ["n", 2], ["y"]), str(source))
    samples = Samples(lambda: [Batch((1 + torch.rand(8, 2),), None)], ["x"], 1)
    with pytest.raises(ExportFailed, match="In 8 bits the model gives what is no number"):
        quantize_file(source, tmp_path / "q.onnx", Quantize(calibration=Calibration(method=method)), samples, ())  # type: ignore[arg-type]
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["zeros", "ones"])
def test_inputs_that_are_always_the_same(value: float, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "c"], ["h"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["y"], "gemm"),
    ]
    source = tmp_path / "constant.onnx"
    given = {"c": floats(6, 2, 3, 3), "w": floats(6, 3), "b": floats(3)}
    onnx.save_model(graph_of(nodes, given, ["n", 2, 5, 5], ["y"]), str(source))
    samples = Samples(lambda: [Batch((torch.full((3, 2, 5, 5), value),), None)], ["x"], 1)
    path, _ = made(source, tmp_path, samples)
    exact = outputs(source, samples)
    np.testing.assert_allclose(outputs(path, samples), exact, atol=0.02 * np.abs(exact).max())


def test_a_graph_for_one_sample_at_a_time_and_of_an_old_opset(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], "n"), helper.make_node("Add", ["m", "b"], ["y"], "a")]
    proto = graph_of(nodes, {"w": floats(8, 4), "b": floats(4)}, [1, 8], ["y"])
    proto.opset_import[0].version = 11
    source = tmp_path / "old.onnx"
    onnx.save_model(proto, str(source))
    samples = Samples(lambda: [Batch((torch.from_numpy(floats(1, 8)),), None) for _ in range(5)], ["x"], 5)
    path, _ = made(source, tmp_path, samples)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.run(None, next(iter(samples)))[0].shape == (1, 4)


def test_infinity_in_an_output_is_no_noise(tmp_path: Path) -> None:
    """A mask sets what is not to be read to minus infinity."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "n"),
        helper.make_node("Add", ["m", "mask"], ["y"], "a"),
    ]
    mask = np.array([0, -np.inf, 0, 0], np.float32)
    source = tmp_path / "masked.onnx"
    onnx.save_model(graph_of(nodes, {"w": floats(8, 4), "mask": mask}, ["n", 8], ["y"]), str(source))
    value = torch.from_numpy(floats(16, 8))
    _, found = made(source, tmp_path, Samples(lambda: [Batch((value,), None)], ["x"], 1), exclude=["a"])
    tried = found.details["calibrations"]
    assert isinstance(tried, list)
    assert all(np.isfinite(float(one["sqnr_db"] or np.nan)) for one in tried)


def test_a_product_behind_an_operator_whose_types_onnx_does_not_know(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["m"], "first"),
        helper.make_node("BiasGelu", ["m", "b"], ["g"], "gelu", domain="com.microsoft"),
        helper.make_node("MatMul", ["g", "w"], ["y"], "second"),
    ]
    proto = graph_of(nodes, {"a": floats(8, 8), "b": floats(8), "w": floats(8, 4)}, ["n", 8], ["y"])
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    source = tmp_path / "gelu.onnx"
    onnx.save_model(proto, str(source))
    value = torch.from_numpy(floats(16, 8))
    samples = Samples(lambda: [Batch((value,), None)], ["x"], 1)
    path, _ = made(source, tmp_path, samples)
    assert sqnr_db(outputs(source, samples), outputs(path, samples)) > 25


def test_factors_for_a_tensor_that_is_an_output_too(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["m"], "first"),
        helper.make_node("Relu", ["m"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["y"], "second"),
    ]
    given = {"a": floats(8, 8), "w": floats(8, 4)}
    given["a"][:, 2] *= 300
    given["w"][2] /= 300
    source = tmp_path / "two.onnx"
    onnx.save_model(graph_of(nodes, given, ["n", 8], ["y", "h"]), str(source))
    value = torch.from_numpy(floats(32, 8))
    samples = Samples(lambda: [Batch((value,), None)], ["x"], 1)
    path, found = made(source, tmp_path, samples)
    assert any(row["tensor"] == "h" for row in found.details["smoothed"])  # type: ignore[union-attr]
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    exact = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    # The tensor itself has 8 bits for all channels, so that what is made of its small ones is coarse.
    feed = next(iter(samples))
    for one, other, least in zip(exact.run(None, feed), session.run(None, feed), (3, 25), strict=True):
        assert sqnr_db(one, other) > least


def test_a_graph_for_four_samples_at_a_time(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "n")]
    source = tmp_path / "four.onnx"
    onnx.save_model(graph_of(nodes, {"w": floats(8, 4)}, [4, 8], ["y"]), str(source))
    values = [torch.from_numpy(floats(4, 8)) for _ in range(3)]
    samples = Samples(lambda: [Batch((value,), None) for value in values], ["x"], 3)
    path, _ = made(source, tmp_path, samples)
    assert sqnr_db(outputs(source, samples), outputs(path, samples)) > 25


def test_a_product_of_a_single_row_without_a_batch(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Squeeze", ["x", "axis"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["m"], "n"),
        helper.make_node("Unsqueeze", ["m", "axis"], ["y"]),
    ]
    source = tmp_path / "row.onnx"
    given = {"w": floats(8, 4), "axis": np.array([0])}
    onnx.save_model(graph_of(nodes, given, [1, 8], ["y"]), str(source))
    values = [torch.from_numpy(floats(1, 8)) for _ in range(8)]
    samples = Samples(lambda: [Batch((value,), None) for value in values], ["x"], 8)
    path, _ = made(source, tmp_path, samples)
    assert sqnr_db(outputs(source, samples), outputs(path, samples)) > 25


def test_values_that_are_all_but_nothing(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "n")]
    source = tmp_path / "tiny.onnx"
    onnx.save_model(graph_of(nodes, {"w": floats(8, 4)}, ["n", 8], ["y"]), str(source))
    value = torch.full((4, 8), 1e-43)
    made(source, tmp_path, Samples(lambda: [Batch((value,), None)], ["x"], 1))
