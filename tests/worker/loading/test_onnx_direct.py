"""A graph that runs as it is: its weights are found, changed and written, also in branches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.worker.loading.onnx_files import Array, Const, model, noise, one_node, run
from worker.constraints import baked, impose_mask
from worker.loading.onnx_constants import IN_A_BRANCH, count_parameters, find_weights, flattened
from worker.loading.onnx_direct import DirectModule
from worker.techniques.pruning.weights import prunable

X = noise(2, 4)


def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [output], **attributes)


def branching(constants: bool = False) -> ModelProto:
    """A shared product, then one of two, chosen by the sum of the batch; the branches use one name each for itself."""
    branches = {}
    for number, name in enumerate(("then_branch", "else_branch")):
        held = numpy_helper.from_array(noise(3, 2, seed=number + 1), "inner")
        nodes = [node("MatMul", ["h", "inner"], f"out{number}")]
        if constants:
            nodes.insert(0, node("Constant", [], "inner", value=held))
        graph = helper.make_graph(nodes, name, [], [], [] if constants else [held])
        graph.output.append(helper.make_tensor_value_info(f"out{number}", TensorProto.FLOAT, ["batch", 2]))
        branches[name] = graph
    nodes = [
        node("MatMul", ["x", "shared"], "h"),
        node("ReduceSum", ["h"], "sum", keepdims=0),
        node("Greater", ["sum", "limit"], "which"),
        node("If", ["which"], "y", **branches),
    ]
    held = {"shared": noise(4, 3), "limit": np.array(0, np.float32)}
    return model(nodes, {"x": X}, held)


def direct(proto: ModelProto, *, single: bool = False) -> DirectModule:
    return DirectModule(proto, tuple(value.name for value in proto.graph.input), "logits", single=single)


def output(module: torch.nn.Module, inputs: Array = X) -> Array:
    result: Array = module(torch.from_numpy(inputs)).numpy()
    return result


@pytest.mark.parametrize("constants", [False, True])
def test_weights_are_found_also_in_branches(constants: bool) -> None:
    module = direct(branching(constants))
    assert [(layer.name, layer.type, layer.shape) for layer in module.layers()] == [
        ("shared", "Linear", (4, 3)),
        ("inner", f"Linear{IN_A_BRANCH}", (3, 2)),
        ("inner_2", f"Linear{IN_A_BRANCH}", (3, 2)),
    ]
    assert [weight.name for weight in prunable(module)] == ["shared.weight", "inner.weight", "inner_2.weight"]
    np.testing.assert_array_equal(output(module), run(branching(constants), {"x": X}))


@pytest.mark.parametrize("constants", [False, True])
def test_the_graph_runs_with_the_weights_as_they_stand(constants: bool) -> None:
    module = direct(branching(constants))
    before = output(module)
    with torch.no_grad():
        module.get_submodule("shared").weight.mul_(0.5)
        module.get_submodule("inner").weight.mul_(3.0)
        module.get_submodule("inner_2").weight.mul_(3.0)
    np.testing.assert_allclose(output(module), before * 1.5, rtol=1e-5)
    np.testing.assert_allclose(run(module.graph(), {"x": X}), before * 1.5, rtol=1e-5)


def test_a_mask_reaches_the_graph_and_the_file() -> None:
    module = direct(branching())
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    output(module)  # a session of the weights before
    impose_mask(module, "shared.weight", mask)
    plain = baked(module)
    written = {tensor.name: numpy_helper.to_array(tensor) for tensor in plain.graph().graph.initializer}  # type: ignore[operator, union-attr]
    np.testing.assert_array_equal(written["shared"], np.where(mask, noise(4, 3), 0))
    np.testing.assert_array_equal(output(module), output(plain))
    np.testing.assert_allclose(output(plain), run(plain.graph(), {"x": X}), atol=1e-6)  # type: ignore[operator]


def test_a_copy_has_weights_of_its_own() -> None:
    module = direct(branching())
    before = output(module)
    copied = copy.deepcopy(module)
    with torch.no_grad():
        copied.get_submodule("shared").weight.zero_()
    np.testing.assert_array_equal(output(copied), np.zeros_like(before))
    np.testing.assert_array_equal(output(module), before)


def test_unchanged_weights_give_the_very_file() -> None:
    proto = branching()
    assert direct(proto).graph() == proto


def test_weights_are_seen_through_what_only_turns_them_and_put_in_plain_view() -> None:
    held = numpy_helper.from_array(noise(3, 4), "held")
    nodes = [
        node("Constant", [], "w", value=held),
        node("Identity", ["w"], "i"),
        node("Transpose", ["i"], "t", perm=[1, 0]),
        node("MatMul", ["x", "t"], "y"),
    ]
    proto = model(nodes, {"x": X})
    module = direct(proto)
    assert [layer.name for layer in module.layers()] == ["w"]
    plain = module.plain_graph()
    assert [node.op_type for node in plain.graph.node] == ["MatMul"]
    assert [tensor.name for tensor in plain.graph.initializer] == ["w.weight"]
    np.testing.assert_allclose(run(plain, {"x": X}), run(proto, {"x": X}), atol=1e-6)


def test_samples_run_one_by_one_where_the_batch_is_fixed() -> None:
    proto = model([node("Reshape", ["x", "s"], "y")], {"x": [1, 2, 2]}, {"s": np.array([1, 4], np.int64)})
    inputs = noise(3, 2, 2)
    np.testing.assert_array_equal(output(direct(proto), inputs), inputs.reshape(3, 4))


def test_inputs_are_cast_to_what_the_graph_declares() -> None:
    proto = one_node("Add", 20, [noise(2, 4).astype(np.float16), Const(np.ones(4, np.float16))])
    assert output(direct(proto)).dtype == np.float32


def test_everything_that_is_held_is_counted() -> None:
    proto = branching()
    assert count_parameters(proto) == 12 + 6 + 6
    assert sorted(tensor.name for tensor in flattened(proto).graph.initializer) == [
        "inner",
        "inner'",
        "limit",
        "shared",
    ]
    assert len(list(find_weights(proto))) == 3


def test_one_weight_of_two_nodes_is_one() -> None:
    nodes = [node("MatMul", ["x", "w"], "h"), node("MatMul", ["h", "w"], "y")]
    assert len(direct(model(nodes, {"x": X}, {"w": noise(4, 4)})).layers()) == 1
