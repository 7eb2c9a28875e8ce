"""Where a graph's logits are, and what its output is of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, helper
from torch import nn

from app.contract.facts import OutputKind, Task
from tests.worker.loading.onnx_files import axes, model, noise, run
from worker.loading.heads import Head, delivering, find_ending, to_logits, to_outputs
from worker.loading.onnx_graph import inferred_shapes

LOGITS = noise(3, 4)


def node(op: str, inputs: Sequence[str], output: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [output], **attributes)


def written_out(spread: bool) -> list[onnx.NodeProto]:
    """A softmax in single steps; JAX brings the sums back to the row's length by hand."""
    nodes = [
        node("ReduceMax", ["x"], "m", axes=[1], keepdims=0 if spread else 1),
        *([node("Unsqueeze", ["m", "one"], "mu"), node("Expand", ["mu", "wide"], "max")] if spread else []),
        node("Sub", ["x", "max" if spread else "m"], "s"),
        node("Exp", ["s"], "e"),
        node("ReduceSum", ["e", "one"], "t"),
        node("Div", ["e", "t"]),
    ]
    return nodes


ENDINGS: dict[str, tuple[list[onnx.NodeProto], int, Task, OutputKind]] = {
    "softmax": ([node("Softmax", ["x"])], 20, "image-classification", "softmax"),
    "softmax over the last of two": ([node("Softmax", ["x"], axis=1)], 20, "image-classification", "softmax"),
    "softmax before opset 13": ([node("Softmax", ["x"])], 11, "text-classification", "softmax"),
    "softmax over the batch": ([node("Softmax", ["x"], axis=0)], 20, "image-classification", "logits"),
    "softmax behind Identity": ([node("Softmax", ["x"], "i"), node("Identity", ["i"])], 20, "multi-label", "softmax"),
    "softmax of values": ([node("Softmax", ["x"])], 20, "regression", "logits"),
    "log-softmax, which is as good as logits": ([node("LogSoftmax", ["x"])], 20, "image-classification", "logits"),
    "sigmoid": ([node("Sigmoid", ["x"])], 20, "multi-label", "sigmoid"),
    "sigmoid of values": ([node("Sigmoid", ["x"])], 20, "regression", "logits"),
    "written out": (written_out(False), 13, "image-classification", "softmax"),
    "written out by JAX": (written_out(True), 13, "image-classification", "softmax"),
    "another quotient": ([node("Exp", ["x"], "e"), node("Div", ["e", "x"])], 13, "image-classification", "logits"),
}


def ending(proto: ModelProto, task: Task) -> tuple[str, OutputKind]:
    found = find_ending(proto, "y", inferred_shapes(proto).get("y"), task)
    return found.logits, found.kind


@pytest.mark.parametrize("name", ENDINGS)
def test_the_logits_of_a_graph_are_found(name: str) -> None:
    nodes, opset, task, kind = ENDINGS[name]
    proto = model(nodes, {"x": LOGITS}, {"one": axes(1).array, "wide": np.array([1, 4], np.int64)}, opset=opset)
    assert ending(proto, task) == ("x" if kind != "logits" else "y", kind)
    if kind != "logits":
        outputs = run(proto, {"x": LOGITS})
        np.testing.assert_allclose(to_outputs(kind, LOGITS), outputs, atol=1e-6)
        assert (to_logits(kind, outputs).argmax(1) == LOGITS.argmax(1)).all()


def test_one_probability_is_two_classes() -> None:
    proto = model([node("Sigmoid", ["x"])], {"x": noise(3, 1)})
    assert ending(proto, "image-classification") == ("x", "binary")
    assert ending(proto, "multi-label") == ("x", "sigmoid")
    single = noise(3, 1)
    logits = Head("binary")(torch.from_numpy(single)).numpy()
    assert logits.shape == (3, 2)
    np.testing.assert_allclose(to_outputs("binary", logits), run(proto, {"x": single}), atol=1e-6)
    np.testing.assert_allclose(np.exp(logits[:, 1]) / np.exp(logits).sum(1), run(proto, {"x": single})[:, 0], atol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "binary"])
def test_logits_of_outputs_are_those_of_the_same_probabilities(kind: OutputKind) -> None:
    outputs = to_outputs(kind, noise(5, 2) * 10)
    np.testing.assert_allclose(to_outputs(kind, to_logits(kind, outputs)), outputs, atol=1e-6)


def test_certain_probabilities_are_finite_logits_and_what_is_no_number_stays_so() -> None:
    logits = to_logits("softmax", np.array([[0.0, 1.0], [np.nan, 1.0]], np.float32))
    assert np.isfinite(logits[0]).all()
    assert logits[0].argmax() == 1
    assert np.isnan(logits[1, 0])


def test_a_module_delivers_within_the_block_alone() -> None:
    module = nn.Sequential(nn.Linear(4, 3), Head("softmax"))
    inputs = torch.randn(2, 4)
    logits = module(inputs)
    with delivering(module):
        torch.testing.assert_close(module(inputs), logits.softmax(-1))
    assert torch.equal(module(inputs), logits)
    with pytest.raises(RuntimeError), delivering(module):
        module(inputs[0, 0])
    assert torch.equal(module(inputs), logits)
