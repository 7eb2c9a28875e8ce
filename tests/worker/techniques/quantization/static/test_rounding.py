"""Rounded weights of a graph: on their grids, zeros kept, and better for the outputs than the nearest."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from onnx import ModelProto, helper, shape_inference

from tests.worker.techniques.quantization.static.graphs import floats, graph_of, run
from worker.data.batch import Batch
from worker.techniques.quantization.calibration import Samples
from worker.techniques.quantization.graph import constants
from worker.techniques.quantization.static.observing import Observed
from worker.techniques.quantization.static.rounding import Rounded, round_weights

BITS = 4  # few, so that a rounding is felt


@pytest.fixture
def proto() -> ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "c"], ["y0"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["y0"], ["y1"]),
        helper.make_node("GlobalAveragePool", ["y1"], ["y2"]),
        helper.make_node("Flatten", ["y2"], ["y3"]),
        helper.make_node("Gemm", ["y3", "w", "b"], ["y"], "gemm"),
    ]
    given = {"c": floats(8, 3, 3, 3), "w": floats(8, 5), "b": floats(5)}
    given["c"][np.abs(given["c"]) < 0.5] = 0
    return shape_inference.infer_shapes(graph_of(nodes, given, ["n", 3, 9, 9], ["y"]))


@pytest.fixture
def values() -> list[np.ndarray]:
    """Channels that go together, so that the error of one can make up for another's."""
    mixed = floats(3, 3)
    return [np.einsum("nchw,cd->ndhw", floats(8, 3, 9, 9) + 1.0, mixed).astype(np.float32) for _ in range(6)]


def rounded(
    proto: ModelProto, values: list[np.ndarray], adaptive: bool, correct: bool = False
) -> tuple[ModelProto, dict[str, Rounded]]:
    own = copy.deepcopy(proto)
    batches = [Batch((torch.from_numpy(value),), None) for value in values]
    samples = Samples(lambda: batches, ["x"], len(batches))
    found = round_weights(own, Observed(own, samples), ["conv", "gemm"], BITS, adaptive=adaptive, correct=correct)
    return own, found


@pytest.mark.parametrize("adaptive", [False, True])
def test_weights_lie_on_grids_and_zeros_stay(proto: ModelProto, values: list[np.ndarray], adaptive: bool) -> None:
    own, found = rounded(proto, values, adaptive)
    assert set(found) == {"c", "w"}
    before, after = constants(proto.graph, ["c", "w"]), constants(own.graph, ["c", "w"])
    for name, steps in found.items():
        rows = np.moveaxis(after[name], steps.axis, 0).reshape(len(steps.steps), -1)
        codes = rows / steps.steps[:, None]
        np.testing.assert_allclose(codes, codes.round(), atol=1e-3)
        assert codes.min() > -(2 ** (BITS - 1)) - 0.5
        assert codes.max() < 2 ** (BITS - 1) - 0.5
    assert not after["c"][before["c"] == 0].any()


def test_adaptive_loses_less_of_the_outputs(proto: ModelProto, values: list[np.ndarray]) -> None:
    exact = [run(proto, value) for value in values]

    def lost(own: ModelProto) -> float:
        return sum(float(np.square(run(own, value) - one).sum()) for value, one in zip(values, exact, strict=True))

    nearest, adaptive = (rounded(proto, values, way)[0] for way in (False, True))
    assert lost(adaptive) < 0.8 * lost(nearest)


def test_corrected_biases_give_the_layers_own_mean_back(proto: ModelProto, values: list[np.ndarray]) -> None:
    """Of the first layer, whose inputs are those of the float graph: its mean over all samples is as it was."""
    own, _ = rounded(proto, values, adaptive=False, correct=True)
    plain, _ = rounded(proto, values, adaptive=False)
    for one in (proto, own, plain):
        one.graph.output[0].name = "y0"
        del one.graph.node[1:]
        while len(one.graph.output) > 1:
            one.graph.output.pop()
    exact, corrected, moved = (
        np.concatenate([run(one, value) for value in values]).mean((0, 2, 3)) for one in (proto, own, plain)
    )
    assert np.abs(corrected - exact).max() < 1e-4
    assert np.abs(moved - exact).max() > 1e-2


def test_a_weight_that_stays_out_is_left_alone(proto: ModelProto, values: list[np.ndarray]) -> None:
    own = copy.deepcopy(proto)
    samples = Samples(lambda: [Batch((torch.from_numpy(values[0]),), None)], ["x"], 1)
    found = round_weights(own, Observed(own, samples), ["gemm"], BITS, adaptive=True, correct=False)
    assert set(found) == {"w"}
    assert np.array_equal(constants(own.graph, ["c"])["c"], constants(proto.graph, ["c"])["c"])
