"""Changed weights go back into the file they came from: same graph, other numbers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from app.contract.errors import ExportFailed
from tests.worker.loading.onnx_files import Array, const, model, noise, one_node, run
from worker.loading.onnx_graph import Imported, import_graph
from worker.loading.onnx_weights import write_weights

X = noise(2, 4)


def changed(imported: Imported, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every weight of the module changed, in place, and its state dict."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in imported.module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
        for name, buffer in imported.module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.mul_(1.5)
    return imported.module.state_dict()


def agrees(proto: ModelProto, imported: Imported, inputs: Array, name: str = "x") -> None:
    with torch.no_grad():
        expected = imported.module.eval()(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(run(proto, {name: inputs}), expected, atol=1e-5)
    onnx.checker.check_model(proto, full_check=True)


def initializers(proto: ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def test_unchanged_weights_give_the_very_file() -> None:
    proto = one_node("Gemm", 13, [X, const(noise(4, 3)), const(noise(3))])
    proto.producer_name = "somebody"
    imported = import_graph(proto, "y")
    assert write_weights(proto, imported, imported.module.state_dict()) == proto


def test_changed_weights_are_the_only_change() -> None:
    proto = one_node("Gemm", 13, [X, const(noise(4, 3)), const(noise(3))])
    imported = import_graph(proto, "y")
    state = changed(imported)
    written = write_weights(proto, imported, state)
    agrees(written, imported, X, "x0")
    np.testing.assert_array_equal(initializers(written)["x1"], state["x1.weight"].numpy().T)
    for tensor in written.graph.initializer:
        tensor.raw_data = numpy_helper.from_array(initializers(proto)[tensor.name]).raw_data
    assert written == proto


LSTM = [noise(1, 16, 4, seed=1), noise(1, 16, 4, seed=2), noise(1, 32, seed=3)]
GRU = [noise(2, 12, 4, seed=1), noise(2, 12, 4, seed=2), noise(2, 24, seed=3)]
STEPS = noise(2, 3, 4)
PICTURE = noise(2, 4, 5, 5)
CHANNELS = [const(np.abs(noise(4, seed=i)) + 0.5) for i in range(4)]

KINDS = {
    "recurrent gates": one_node("LSTM", 14, [STEPS, *map(const, LSTM)], hidden_size=4, outputs=1),
    "two directions": one_node(
        "GRU", 14, [STEPS, *map(const, GRU)], hidden_size=4, direction="bidirectional", linear_before_reset=1
    ),
    "statistics": one_node("BatchNormalization", 15, [PICTURE, *CHANNELS]),
    "a kernel": one_node("Conv", 11, [PICTURE, const(noise(6, 4, 3, 3))], pads=[0, 1, 1, 0]),
    "a transposed kernel": one_node("ConvTranspose", 11, [PICTURE, const(noise(4, 3, 2, 2)), const(noise(3))]),
    "slopes": one_node("PRelu", 11, [PICTURE, const(noise(4, 1, 1))]),
    "a gain": one_node("Mul", 20, [X, const(noise(4))]),
}


@pytest.mark.parametrize("name", KINDS)
def test_weights_of_every_form_find_their_way_back(name: str) -> None:
    proto = KINDS[name]
    imported = import_graph(proto, "y")
    state = changed(imported)
    written = write_weights(proto, imported, state)
    agrees(written, imported, {"x0": PICTURE, "steps": STEPS, "row": X}[_input(proto)], "x0")
    assert initializers(written).keys() == initializers(proto).keys()


def _input(proto: ModelProto) -> str:
    rank = len(proto.graph.input[0].type.tensor_type.shape.dim)
    return {2: "row", 3: "steps", 4: "x0"}[rank]


def test_weights_in_constant_nodes_are_changed_there() -> None:
    held = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(noise(4, 3), "held"))
    floats = helper.make_node("Constant", [], ["b"], value_floats=[0.1, 0.2, 0.3])
    nodes = [held, helper.make_node("Identity", ["w"], ["i"]), helper.make_node("MatMul", ["x", "i"], ["h"])]
    proto = model([floats, *nodes, helper.make_node("Add", ["h", "b"], ["y"])], {"x": X})
    imported = import_graph(proto, "y")
    changed(imported)
    written = write_weights(proto, imported, imported.module.state_dict())
    agrees(written, imported, X)
    assert [node.op_type for node in written.graph.node] == [node.op_type for node in proto.graph.node]
    assert not written.graph.initializer


def test_what_was_one_tensor_in_the_file_and_is_two_weights_becomes_two() -> None:
    channels = {"ones": np.ones(4, np.float32), "zeros": np.zeros(4, np.float32)}
    names = ["ones", "zeros", "zeros", "ones"]
    nodes = [
        helper.make_node("BatchNormalization", ["x", *names], ["h"]),
        helper.make_node("BatchNormalization", ["h", *names], ["y"]),
    ]
    proto = model(nodes, {"x": PICTURE}, channels)
    imported = import_graph(proto, "y")
    imported.module.train()(torch.from_numpy(PICTURE))
    changed(imported)
    agrees(write_weights(proto, imported, imported.module.state_dict()), imported, PICTURE)


def test_a_tensor_that_serves_something_else_stays() -> None:
    """The scale that is made of the weight is a constant of the module."""
    nodes = [
        helper.make_node("ReduceMax", ["w"], ["m"], keepdims=0),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "m"], ["y"]),
    ]
    proto = model(nodes, {"x": X}, {"w": noise(4, 3)}, opset=13)
    imported = import_graph(proto, "y")
    changed(imported)
    written = write_weights(proto, imported, imported.module.state_dict())
    agrees(written, imported, X)
    np.testing.assert_array_equal(initializers(written)["w"], initializers(proto)["w"])


def test_a_weight_that_was_computed_gets_a_tensor_and_leaves_nothing_behind() -> None:
    nodes = [helper.make_node("Mul", ["v", "g"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    proto = model(nodes, {"x": X}, {"v": noise(4, 3), "g": noise(4, 1)})
    imported = import_graph(proto, "y")
    assert write_weights(proto, imported, imported.module.state_dict()) == proto
    changed(imported)
    written = write_weights(proto, imported, imported.module.state_dict())
    agrees(written, imported, X)
    assert list(initializers(written)) == ["w_changed"]
    assert [node.op_type for node in written.graph.node] == ["MatMul"]


def test_tied_weights_stay_one_tensor() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("Transpose", ["table"], ["turned"]),
        helper.make_node("MatMul", ["e", "turned"], ["y"]),
    ]
    ids = np.array([[0, 2], [4, 1]])
    proto = model(nodes, {"ids": ids}, {"table": noise(5, 3)})
    imported = import_graph(proto, "y")
    changed(imported)
    written = write_weights(proto, imported, imported.module.state_dict())
    agrees(written, imported, ids, "ids")
    assert len(written.graph.initializer) == 1


def test_weights_keep_their_type() -> None:
    weight = noise(4, 3).astype(np.float16)
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["h", "w"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]
    proto = model(nodes, {"x": X}, {"w": weight})
    imported = import_graph(proto, "y")
    state = changed(imported)
    (tensor,) = write_weights(proto, imported, state).graph.initializer
    assert tensor.data_type == TensorProto.FLOAT16
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), state["w.weight"].numpy().T.astype(np.float16))


def test_a_weight_of_another_shape_is_refused() -> None:
    proto = one_node("Gemm", 13, [X, const(noise(4, 3))])
    imported = import_graph(proto, "y")
    with pytest.raises(ExportFailed, match=r"x1.weight has the shape \[2, 4\]"):
        write_weights(proto, imported, {"x1.weight": torch.zeros(2, 4)})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the older exporter, whose files are still made
@pytest.mark.parametrize("dynamo", [False, True])
def test_a_trained_network_comes_back(dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.LayerNorm(8)
    ).eval()
    buffer = io.BytesIO()
    options = {"dynamic_axes": {"x": {0: "b"}}} if not dynamo else {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}
    torch.onnx.export(
        network, (torch.randn(2, 1, 8, 8),), buffer, dynamo=dynamo, input_names=["x"], output_names=["y"], **options
    )
    proto = onnx.load_from_string(buffer.getvalue())
    imported = import_graph(proto, "y")
    optimizer = torch.optim.SGD(imported.module.train().parameters(), lr=0.1)
    for _ in range(3):
        loss = imported.module(torch.randn(8, 1, 8, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    written = write_weights(proto, imported, imported.module.state_dict())
    agrees(written, imported, noise(3, 1, 8, 8))
    assert written.opset_import == proto.opset_import
    assert len(written.graph.node) == len(proto.graph.node)
