"""Factors moved from channels into weights: the graph gives the same, and 8 bits hold more of it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from onnx import ModelProto, helper, shape_inference

from tests.worker.techniques.quantization.static.graphs import floats, graph_of, run
from worker.data.batch import Batch
from worker.techniques.quantization.calibration import Samples
from worker.techniques.quantization.graph import constants, replace_constant
from worker.techniques.quantization.static import smoothing_math
from worker.techniques.quantization.static.observing import Observed
from worker.techniques.quantization.static.smoothing import smooth

WIDTH = 16


def reaching(times: float = 60.0) -> np.ndarray:
    """[8, WIDTH] with one channel that reaches much farther than the others."""
    value = floats(8, WIDTH)
    value[:, 3] *= times
    return value


def model(norm: bool, others: bool = False) -> ModelProto:
    """A norm or a plain sum in front of two products, and if asked for something else that reads it too."""
    made = ["LayerNormalization", ["x", "g", "s"]] if norm else ["Add", ["x", "s"]]
    nodes = [
        helper.make_node(made[0], made[1], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["a"], "first"),
        helper.make_node("MatMul", ["h", "v"], ["b"], "second"),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Add", ["c", "h"], ["y"]) if others else helper.make_node("Identity", ["c"], ["y"]),
    ]
    gain = np.ones(WIDTH, np.float32)
    gain[3] = 60
    given = {"s": floats(WIDTH), "w": floats(WIDTH, WIDTH), "v": floats(WIDTH, WIDTH)} | ({"g": gain} if norm else {})
    return shape_inference.infer_shapes(graph_of(nodes, given, ["n", WIDTH], ["y"]))


def smoothed(proto: ModelProto, values: np.ndarray) -> tuple[ModelProto, list[dict[str, object]], list[str]]:
    own = copy.deepcopy(proto)
    samples = Samples(lambda: [Batch((torch.from_numpy(values),), None)] * 2, ["x"], 2)
    rows, spent = smooth(own, Observed(own, samples), ["first", "second"], 8)
    return own, rows, spent


@pytest.mark.parametrize(("norm", "others"), [(True, False), (True, True), (False, False)])
def test_the_graph_gives_the_same(norm: bool, others: bool) -> None:
    proto = model(norm, others)
    values = floats(8, WIDTH) if norm else reaching()
    own, rows, spent = smoothed(proto, values)
    (row,) = rows
    assert row["tensor"] == "h"
    assert row["error_left"] < 0.5  # type: ignore[operator]
    exact = run(proto, values)
    np.testing.assert_allclose(run(own, values), exact, atol=1e-5 * np.abs(exact).max())
    # Only a norm that nothing else reads can take the factors.
    assert spent == ([] if norm and not others else ["h_smooth"])


def test_no_factors_where_all_channels_reach_alike() -> None:
    proto = model(norm=False)
    signs = {name: np.sign(floats(WIDTH, WIDTH)) for name in ("w", "v")}
    for name, value in signs.items():
        replace_constant(proto.graph, name, value)
    shift = constants(proto.graph, ["s"])["s"]
    own, rows, spent = smoothed(proto, np.sign(floats(8, WIDTH)) - shift)
    assert not rows
    assert not spent
    assert own == proto


def test_factors_of_an_exponent_by_hand() -> None:
    given = torch.tensor([[1.0, -8.0], [0.5, 4.0]])
    weight = torch.tensor([[2.0, 0.5]])
    found = smoothing_math.by_exponent(given, [weight], 0.5)
    # max|x| = 1, 8; max|w| = 2, 0.5: (1 / 2)^0.5, (8 / 0.5)^0.5, and around 1 by their geometric middle.
    plain = torch.tensor([0.5, 16.0]).sqrt()
    torch.testing.assert_close(found, plain / (plain[0] * plain[1]).sqrt())


def test_factors_by_reach_touch_outliers_alone() -> None:
    given = torch.tensor([[1.0, 2.0, 3.0, 40.0]])
    found = smoothing_math.by_reach(given, 2.0)
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 1.0, 10.0]))  # torch's median of four is the second


def test_the_error_is_that_of_the_integers() -> None:
    """With inputs and weights rounded by NumPy."""
    given, weight = reaching(), floats(5, WIDTH)
    low, high = min(0, given.min()), max(0, given.max())
    step = (high - low) / 255
    zero = np.round(-low / step)
    codes = np.clip(np.round(given / step) + zero, 0, 255)
    own = np.abs(weight).max(1, keepdims=True) / 128
    found = ((codes - zero) * step) @ (np.round(weight / own) * own).T
    exact = given @ weight.T
    expected = (np.square(found - exact).sum(1) / np.square(exact).sum(1)).sum()
    got = smoothing_math.error(torch.from_numpy(given), [torch.from_numpy(weight)], None, 8)
    assert got == pytest.approx(expected, rel=1e-3)
