"""Whole graphs as modules: names, ties, biases, shapes that stay open, gradients, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional

from tests.worker.loading.onnx_files import Array, const, model, noise, one_node, run
from worker.loading.onnx_graph import NotImportable, failing_operator, import_graph
from worker.loading.onnx_ops.errors import Unsupported
from worker.loading.onnx_ops.names import MAX_LENGTH, Names

X = noise(2, 4)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), list(outputs), **attributes)


def imported(proto: ModelProto, output: str = "y", **options: Any) -> fx.GraphModule:
    return import_graph(proto, output, **options).module.eval()


def agrees(proto: ModelProto, *inputs: Array, output: str = "y") -> fx.GraphModule:
    """The module of the graph, which gives what ONNX Runtime gives."""
    module = imported(proto, output)
    names = [value.name for value in proto.graph.input]
    expected = run(proto, dict(zip(names, inputs, strict=True)), output)
    with torch.no_grad():
        got = module(*(torch.from_numpy(array) for array in inputs)).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5 * max(1, np.abs(expected[np.isfinite(expected)]).max()))
    return module


def exported(module: nn.Module, *inputs: Tensor, dynamo: bool = False, opset: int = 17, **options: Any) -> ModelProto:
    """A network through torch's own exporter, with an open batch; the older one keeps BatchNorm and names."""
    buffer = io.BytesIO()
    names = [f"x{i}" for i in range(len(inputs))]
    torch.onnx.export(
        module,
        inputs,
        buffer,
        dynamo=dynamo,
        opset_version=opset,
        input_names=names,
        output_names=["y"],
        dynamic_axes={name: {0: "batch"} for name in (*names, "y")},
        **options,
    )
    return onnx.load_from_string(buffer.getvalue())


# --- names --------------------------------------------------------------------------------------------------------


def test_layers_are_named_after_their_weights() -> None:
    weights = {"features.0.weight": noise(5, 4), "features.0.bias": noise(5), "model/dense/MatMul:0": noise(5, 3)}
    nodes = [
        node("Gemm", ["x", "features.0.weight", "features.0.bias"], ["h"], transB=1),
        node("MatMul", ["h", "model/dense/MatMul:0"]),
    ]
    module = agrees(model(nodes, {"x": X}, weights), X)
    assert {name: type(layer).__name__ for name, layer in module.named_modules() if isinstance(layer, nn.Linear)} == {
        "features.0": "Linear",
        "model.dense.MatMul_0": "Linear",
    }
    assert set(module.state_dict()) == {"features.0.weight", "features.0.bias", "model.dense.MatMul_0.weight"}
    assert torch.equal(module.get_parameter("features.0.weight"), torch.from_numpy(weights["features.0.weight"]))


HOSTILE = [
    "a'b\"); import os #",
    "__class__",
    "forward",
    "x.weight",
    "",
    "é" * 10_000,
    "../../etc",
    "lambda",
    "a\nb",
    "0",
]


def test_no_name_reaches_the_code_that_fx_writes(tmp_path: Path) -> None:
    weights = {name: noise(4, 4, seed=i) for i, name in enumerate(HOSTILE) if name}
    nodes, last = [], "in'); import os"
    for index, name in enumerate(weights):
        nodes.append(node("MatMul", [last, name], [f"h{index}"]))
        last = f"h{index}"
    nodes.append(node("Identity", [last]))
    module = agrees(model(nodes, {"in'); import os": X}, weights), X)
    assert "import" not in module.code.replace("import_os", "")
    assert all(part.replace("_", "a").isalnum() for name in module.state_dict() for part in name.split("."))


def test_names_are_unique_and_never_lead_through_a_layer() -> None:
    names = Names()
    given = [names.layer(name) for name in ("a.weight", "a.b.weight", "a", "a", "training", "c.d", "c", "x" * 10_000)]
    assert given == ["a", "a_b", "a_2", "a_3", "training_", "c.d", "c_2", "x" * MAX_LENGTH]
    assert names.fresh(".".join("abcdefghijklmnopqrst")) == "_".join("abcdefghijklmnopqrst")


# --- weights ------------------------------------------------------------------------------------------------------


def test_a_table_and_the_output_layer_that_share_it_are_tied() -> None:
    nodes = [
        node("Gather", ["table", "ids"], ["e"]),
        node("Transpose", ["table"], ["turned"]),
        node("MatMul", ["e", "turned"]),
    ]
    ids = np.array([[0, 2], [4, 1]])
    module = agrees(model(nodes, {"ids": ids}, {"table": noise(5, 3)}), ids)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    assert len(parameters) == 2
    assert len(set(parameters.values())) == 1
    assert {type(layer) for layer in module.modules()} >= {nn.Embedding, nn.Linear}


def test_vectors_that_an_exporter_wrote_once_are_weights_of_their_own() -> None:
    channels = {"ones": np.ones(4, np.float32), "zeros": np.zeros(4, np.float32)}
    picture = noise(2, 4, 3, 3)
    nodes = [
        node("BatchNormalization", ["x", "ones", "zeros", "zeros", "ones"], ["h"]),
        node("BatchNormalization", ["h", "ones", "zeros", "zeros", "ones"]),
    ]
    module = agrees(model(nodes, {"x": picture}, channels), picture)
    first, second = (layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d))
    assert first.weight is not second.weight
    module.train()(torch.from_numpy(picture))
    assert not torch.equal(first.running_mean, second.running_mean)  # type: ignore[arg-type]


def test_weights_in_constant_nodes_behind_identities_are_layers() -> None:
    held = {"w": noise(6, 4, 3, 3), "b": noise(1, 6, 1, 1), "table": noise(6, 5)}
    nodes = [
        *(node("Constant", [], [name], value=numpy_helper.from_array(array)) for name, array in held.items()),
        *(node("Identity", [name], [f"{name}_"]) for name in held),
        node("Conv", ["x", "w_"], ["c"]),
        node("Add", ["c", "b_"], ["h"]),
        node("GlobalAveragePool", ["h"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("MatMul", ["f", "table_"]),
    ]
    picture = noise(2, 4, 5, 5)
    module = agrees(model(nodes, {"x": picture}), picture)
    assert set(dict(module.named_parameters())) == {"w.weight", "w.bias", "table.weight"}


@pytest.mark.parametrize(("also_read", "bias"), [(False, True), (True, False)])
def test_an_addition_becomes_a_bias_where_nothing_else_reads_the_product(also_read: bool, bias: bool) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Add", ["b", "h"], ["s"]),
        node("Mul", ["s", "h" if also_read else "s"]),
    ]
    module = agrees(model(nodes, {"x": X}, {"w": noise(4, 3), "b": noise(3)}), X)
    (layer,) = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    assert (layer.bias is not None) == bias
    assert sum(parameter.numel() for parameter in module.parameters()) == 15


def test_one_number_a_row_is_no_bias() -> None:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Add", ["h", "b"])]
    module = agrees(model(nodes, {"x": noise(2, 3, 4)}, {"w": noise(4, 3), "b": noise(3, 1)}), noise(2, 3, 4))
    assert not any(isinstance(layer, nn.Linear) and layer.bias is not None for layer in module.modules())


def test_gains_and_tables_are_trained_and_masks_are_not() -> None:
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    held = {"gain": noise(4), "mask": mask, "scale": np.array([0.5], np.float32)}
    nodes = [node("Mul", ["x", "gain"], ["g"]), node("Mul", ["g", "scale"], ["s"]), node("Add", ["s", "mask"])]
    square = noise(2, 4, 4)
    module = agrees(model(nodes, {"x": square}, held), square)
    assert set(dict(module.named_parameters())) == {"gain"}


def test_dropout_works_in_training_alone() -> None:
    module = agrees(one_node("Dropout", 20, [X, const(0.5)]), X)
    (layer,) = (layer for layer in module.modules() if isinstance(layer, nn.Dropout))
    assert layer.p == 0.5
    torch.manual_seed(0)
    assert (module.train()(torch.ones(50, 4)) == 0).any()


# --- shapes -------------------------------------------------------------------------------------------------------


def shape_of(value: str, prefix: str, *dimensions: int) -> list[onnx.NodeProto]:
    """The sizes of dimensions of a value as vectors of one, `<prefix>0`, `<prefix>1`, …"""
    nodes = [node("Shape", [value], [f"{prefix}shape"])]
    for number, dimension in enumerate(dimensions):
        index = numpy_helper.from_array(np.array(dimension, np.int64))
        nodes += [
            node("Constant", [], [f"{prefix}index{number}"], value=index),
            node("Gather", [f"{prefix}shape", f"{prefix}index{number}"], [f"{prefix}size{number}"]),
            node("Unsqueeze", [f"{prefix}size{number}", "zero"], [f"{prefix}{number}"]),
        ]
    return nodes


CONSTANTS = {
    "zero": np.array([0], np.int64),
    "one": np.array(1, np.int64),
    "nought": np.array(0, np.int64),
    "rest": np.array([-1], np.int64),
    "minus": np.array([-1, 1, 1], np.int64),
    "ones": np.array([1, 1, 1], np.int64),
    "token": noise(1, 1, 4),
    "half": np.array([0.5], np.float32),
}


def flattened() -> list[onnx.NodeProto]:
    """x.view(x.size(0), -1), as the older exporter writes it."""
    return [
        *shape_of("x", "s", 0),
        node("Concat", ["s0", "rest"], ["target"], axis=0),
        node("Reshape", ["x", "target"]),
    ]


def with_a_token() -> list[onnx.NodeProto]:
    """A learnt token before every sequence, expanded by way of Where(Equal(shape, -1))."""
    return [
        *shape_of("x", "s", 0),
        node("Constant", [], ["tail"], value=numpy_helper.from_array(np.array([-1, -1], np.int64))),
        node("Concat", ["s0", "tail"], ["wanted"], axis=0),
        node("Shape", ["wanted"], ["rank"]),
        node("ConstantOfShape", ["rank"], ["all"], value=numpy_helper.from_array(np.array([1], np.int64))),
        node("Mul", ["all", "rest"], ["negative"]),
        node("Equal", ["wanted", "negative"], ["open"]),
        node("Where", ["open", "all", "wanted"], ["sizes"]),
        node("Expand", ["token", "sizes"], ["tokens"]),
        node("Concat", ["tokens", "x"], axis=1),
    ]


def with_positions() -> list[onnx.NodeProto]:
    """Positions counted from the length of the sequence, added as floats."""
    return [
        *shape_of("x", "s", 1),
        node("Squeeze", ["s0", "zero"], ["length"]),
        node("Range", ["nought", "length", "one"], ["positions"]),
        node("Cast", ["positions"], ["counted"], to=onnx.TensorProto.FLOAT),
        node("Unsqueeze", ["counted", "rest"], ["column"]),
        node("Add", ["x", "column"]),
    ]


def halved() -> list[onnx.NodeProto]:
    """The first half of every sequence: floor(length * 0.5) by way of floats."""
    return [
        *shape_of("x", "s", 1),
        node("Cast", ["s0"], ["float"], to=onnx.TensorProto.FLOAT),
        node("Mul", ["float", "half"], ["share"]),
        node("Floor", ["share"], ["whole"]),
        node("Cast", ["whole"], ["end"], to=onnx.TensorProto.INT64),
        node("Constant", [], ["axis"], value=numpy_helper.from_array(np.array([1], np.int64))),
        node("Slice", ["x", "zero", "end", "axis"]),
    ]


def padded() -> list[onnx.NodeProto]:
    """Pads in torch's order, turned round as the older exporter does for sizes that it does not know."""
    pads = numpy_helper.from_array(np.array([0, 2, 1, 0], np.int64))
    more = numpy_helper.from_array(np.array([0], np.int64))
    numbers = {"two": [-1, 2], "from": [-1], "to": [-(2**40)], "first": [0], "back": [-1]}
    return [
        node("Constant", [], ["pads"], value=pads),
        node("ConstantOfShape", ["count"], ["zeros"], value=more),
        node("Concat", ["pads", "zeros"], ["all"], axis=0),
        *(
            node("Constant", [], [name], value=numpy_helper.from_array(np.array(values, np.int64)))
            for name, values in numbers.items()
        ),
        node("Reshape", ["all", "two"], ["pairs"]),
        node("Slice", ["pairs", "from", "to", "first", "back"], ["reversed"]),
        node("Transpose", ["reversed"], ["turned"], perm=[1, 0]),
        node("Reshape", ["turned", "rest"], ["flat"]),
        node("Cast", ["flat"], ["final"], to=onnx.TensorProto.INT64),
        node("Pad", ["x", "final"]),
    ]


def filled() -> list[onnx.NodeProto]:
    """A tensor of zeros in the shape of another."""
    return [
        node("Shape", ["x"], ["s"]),
        node("ConstantOfShape", ["s"], ["zeros"], value=numpy_helper.from_array(np.array([2.0], np.float32))),
        node("Mul", ["x", "zeros"]),
    ]


@pytest.mark.parametrize("build", [flattened, with_a_token, with_positions, halved, padded, filled])
def test_computations_of_shapes_stay_open(build: Any, tmp_path: Path) -> None:
    constants = CONSTANTS | {"count": np.array([2], np.int64)}
    proto = model(build(), {"x": ["batch", "steps", 4]}, constants)
    for batch, steps in ((2, 6), (1, 3), (5, 8)):
        agrees(proto, noise(batch, steps, 4))
    module = imported(proto)
    dimensions = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, (torch.randn(3, 6, 4),), dynamic_shapes=(dimensions,))
    inputs = noise(7, 10, 4)
    with torch.no_grad():
        got = program.module()(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(got, run(proto, {"x": inputs}), atol=1e-6)


def test_a_fixed_batch_of_one_is_opened() -> None:
    nodes = [node("Reshape", ["x", "shape"], ["h"]), node("MatMul", ["h", "w"])]
    proto = model(nodes, {"x": [1, 2, 3, 4]}, {"shape": np.array([1, 24], np.int64), "w": noise(24, 5)})
    module = imported(proto, fixed_batch=True)
    inputs = noise(3, 2, 3, 4)
    with torch.no_grad():
        got = module(torch.from_numpy(inputs)).numpy()
    expected = np.concatenate([run(proto, {"x": inputs[i : i + 1]}) for i in range(3)])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_constants_that_would_grow_are_not_made_ahead() -> None:
    huge = np.array([1 << 20, 1 << 20], np.int64)
    proto = model([node("Expand", ["c", "shape"], ["big"]), node("Add", ["x", "big"])], {"x": X}, {"c": noise(1, 1)})
    proto.graph.initializer.append(numpy_helper.from_array(huge, "shape"))
    assert sum(buffer.numel() for buffer in imported(proto).buffers()) == 1


# --- training -----------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Convolution, BatchNorm, a residual, an embedding of nothing else than torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.conv(x)))
        x = x + functional.gelu(self.deep(x))
        x = functional.max_pool2d(x, 2).flatten(2).mean(-1)
        return self.fc(self.norm(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the older exporter, whose files are still made
def test_a_training_step_equals_that_of_the_module_it_came_from() -> None:
    torch.manual_seed(0)
    network = Network()
    proto = exported(
        network.eval(), torch.randn(2, 1, 8, 8), training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False
    )
    module = imported(proto)
    inputs, targets = torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))
    losses = []
    for one in (network.train(), module.train()):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(3):
            loss = functional.cross_entropy(one(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    trained = module.state_dict()
    for name, expected in network.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(trained[name], expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(inputs), network.eval()(inputs), atol=1e-5, rtol=1e-4)


# --- refusals -----------------------------------------------------------------------------------------------------


def branching() -> ModelProto:
    """One of two products, chosen by the data."""
    branches = {}
    for name, weight in (("then_branch", "w"), ("else_branch", "v")):
        held = numpy_helper.from_array(noise(4, 3, seed=len(name)), weight)
        inner = helper.make_graph([node("MatMul", ["x", weight], [f"{weight}y"])], name, [], [], [held])
        inner.output.append(helper.make_tensor_value_info(f"{weight}y", onnx.TensorProto.FLOAT, ["batch", 3]))
        branches[name] = inner
    nodes = [
        node("ReduceSum", ["x"], ["sum"], keepdims=0),
        node("Greater", ["sum", "limit"], ["which"]),
        node("If", ["which"], ["y"], **branches),
    ]
    return model(nodes, {"x": X}, {"limit": np.array(0, np.float32)})


def test_control_flow_is_refused_and_what_does_not_need_it_is_not() -> None:
    proto = branching()
    with pytest.raises(NotImportable, match=r"control flow \(If\).*dynamo=True"):
        import_graph(proto, "y")
    assert import_graph(proto, "sum").module(torch.from_numpy(X)).item() == pytest.approx(X.sum(), abs=1e-5)


def test_an_output_of_constants_alone_is_refused() -> None:
    proto = model([node("Identity", ["c"])], {"x": X}, {"c": noise(2, 3)})
    with pytest.raises(NotImportable, match="does not depend on its inputs"):
        import_graph(proto, "y")


def test_the_failing_operator_is_named() -> None:
    proto = model([helper.make_node("Reshape", ["x", "s"], ["y"], name="flat")], {"x": X, "s": np.array([-1])})
    module = imported(proto)
    inputs = (torch.from_numpy(X), torch.tensor([-1]))
    with pytest.raises(Unsupported):
        module(*inputs)
    words = "operator Reshape ('flat') computes a size or an index list out of the data"
    assert failing_operator(module, inputs) == words
