"""Weights of few bits in an ONNX file: what ONNX Runtime computes with them, what is stored, and what stays float."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from app.contract.errors import ExportFailed
from app.contract.facts import TensorFacts
from app.contract.weight_only import WeightOnly
from tests.worker.helpers import context_for, convnet, digits_data, mlp, tiny_model
from worker.context import Context
from worker.evaluation.layers import graph_layers, graph_parameters
from worker.evaluation.onnx_macs import graph_macs
from worker.export.registry import write_onnx
from worker.model import Model
from worker.techniques.quantization import hqq_math
from worker.techniques.quantization.grid_math import least_squares
from worker.techniques.quantization.onnx_bits import store_bits
from worker.techniques.quantization.quantize import QuantizeTechnique
from worker.techniques.quantization.stored import packed_bits, stored_weights, unpacked
from worker.techniques.quantization.weight_grid import WeightGrid


def run(proto: ModelProto, inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    return found


def on_grid(
    outputs: int, columns: int, bits: int, group: int, symmetric: bool, zeros: float = 0.0
) -> tuple[np.ndarray, WeightGrid]:
    """A random weight [outputs, columns] that lies on its grids."""
    torch.manual_seed(outputs + columns + bits)
    weight = torch.randn(outputs, columns) + 0.3
    weight[torch.rand_like(weight) < zeros] = 0.0
    grids = [least_squares(part, bits, symmetric) for part in weight.split(group, 1)]
    values = torch.cat([grid.rounded(part) for grid, part in zip(grids, weight.split(group, 1), strict=True)], 1)
    return values.numpy(), WeightGrid.of(grids, bits, group, symmetric)


def product(weight: np.ndarray, kind: str, shared: bool = False) -> ModelProto:
    """x W^T, as Gemm with a bias or as MatMul; `shared` hands the weight out as well."""
    outputs, columns = weight.shape
    held = numpy_helper.from_array(weight if kind == "Gemm" else np.ascontiguousarray(weight.T), "0.weight")
    bias = numpy_helper.from_array(np.arange(outputs, dtype=np.float32), "0.bias")
    if kind == "Gemm":
        nodes = [helper.make_node("Gemm", ["x", "0.weight", "0.bias"], ["y"], "product", transB=1)]
    else:
        nodes = [helper.make_node("MatMul", ["x", "0.weight"], ["y"], "product")]
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", outputs])]
    if shared:
        nodes.append(helper.make_node("Identity", ["0.weight"], ["copy"]))
        results.append(helper.make_tensor_value_info("copy", TensorProto.FLOAT, held.dims))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", columns])]
    graph = helper.make_graph(nodes, "g", inputs, results, [held, bias] if kind == "Gemm" else [held])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def stored(proto: ModelProto, grids: dict[str, WeightGrid], folder: Path) -> ModelProto:
    onnx.save_model(proto, str(folder / "float.onnx"))
    store_bits(folder / "float.onnx", folder / "bits.onnx", grids)
    found = onnx.load(folder / "bits.onnx")
    onnx.checker.check_model(found)
    return found


@pytest.mark.parametrize("kind", ["Gemm", "MatMul"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "columns", "group"),
    [(4, 256, 128), (4, 96, 32), (8, 128, 64), (2, 96, 16), (3, 64, 32), (4, 100, 100), (8, 30, 30), (2, 17, 17)],
)
def test_the_runtime_computes_what_the_floats_give(
    tmp_path: Path, kind: str, symmetric: bool, bits: int, columns: int, group: int
) -> None:
    weight, grid = on_grid(24, columns, bits, group, symmetric, zeros=0.2)
    proto = product(weight, kind)
    found = stored(proto, {"0.weight": grid}, tmp_path)
    expected_nodes = ["MatMulNBits", "Add"] if kind == "Gemm" else ["MatMulNBits"]
    assert [node.op_type for node in found.graph.node] == expected_nodes
    inputs = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)
    expected, got = run(proto, inputs), run(found, inputs)
    # The operator rounds activations to 8 bits.
    assert np.linalg.norm(got - expected) < 0.012 * np.linalg.norm(expected)
    own = stored_weights(found)[0]
    assert own.name == "0.weight"
    assert own.bits == {2: 2, 3: 4, 4: 4, 8: 8}[bits]
    np.testing.assert_array_equal(own.dequantized(), weight if kind == "Gemm" else weight.T)
    assert own.zeros() == np.count_nonzero(weight == 0)


@pytest.mark.parametrize("kind", ["Gemm", "MatMul"])
@pytest.mark.parametrize(("bits", "columns", "group"), [(4, 256, 128), (3, 96, 32), (2, 96, 96), (8, 128, 64)])
def test_zero_points_that_are_no_whole_numbers(tmp_path: Path, kind: str, bits: int, columns: int, group: int) -> None:
    """The operator's own are whole; what they lack is added to what it gives."""
    torch.manual_seed(bits)
    weight = torch.randn(24, columns) + 0.3
    grids = [hqq_math.fitted(part, bits) for part in weight.split(group, 1)]
    values = torch.cat([grid.rounded(part) for grid, part in zip(grids, weight.split(group, 1), strict=True)], 1)
    grid = WeightGrid.of(grids, bits, group, symmetric=False)
    assert not torch.equal(grid.zero, grid.zero.round())
    proto = product(values.numpy(), kind)
    found = stored(proto, {"0.weight": grid}, tmp_path)
    inputs = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)
    expected, got = run(proto, inputs), run(found, inputs)
    assert np.linalg.norm(got - expected) < 0.012 * np.linalg.norm(expected)
    (own,) = stored_weights(found)
    assert (own.name, own.bits) == ("0.weight", {3: 4}.get(bits, bits))
    weights = values.numpy() if kind == "Gemm" else values.numpy().T
    np.testing.assert_allclose(own.dequantized(), weights, rtol=1e-4, atol=1e-6)
    (row,) = graph_layers(found, proto)
    assert (row.bits, row.parameters, row.sqnr_db) == (own.bits, 24 * columns, None)
    assert graph_parameters(found)[0] == 24 * columns + (24 if kind == "Gemm" else 0)


def test_zero_points_that_are_no_whole_numbers_need_operators_that_are_not_old(tmp_path: Path) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    grid = hqq_math.fitted(weight, 4)
    proto = product(grid.rounded(weight).numpy(), "Gemm")
    proto.opset_import[0].version = 12
    found = stored(proto, {"0.weight": WeightGrid.of([grid], 4, 32, symmetric=False)}, tmp_path)
    assert [node.op_type for node in found.graph.node] == ["Gemm"]


@pytest.mark.parametrize("kind", ["Gemm", "MatMul"])
def test_the_report_knows_the_layer(tmp_path: Path, kind: str) -> None:
    weight, grid = on_grid(24, 96, 4, 32, symmetric=False, zeros=0.5)
    proto = product(weight, kind)
    found = stored(proto, {"0.weight": grid}, tmp_path)
    (row,) = graph_layers(found, proto)
    assert (row.name, row.bits, row.parameters, row.shape) == ("0.weight", 4, 24 * 96, (24, 96))
    assert row.sqnr_db is None  # the float file has the same weight
    assert row.sparsity == pytest.approx(np.mean(weight == 0))
    biases = 24 if kind == "Gemm" else 0
    nonzero = np.count_nonzero(weight) + max(0, biases - 1)  # the first bias is 0
    assert graph_parameters(found) == (24 * 96 + biases, nonzero)
    assert graph_macs(found, {"x": np.zeros((1, 96), np.float32)}) == 24 * 96


def test_a_weight_that_something_else_uses_stays_as_it_is(tmp_path: Path) -> None:
    weight, grid = on_grid(24, 96, 4, 32, symmetric=False)
    found = stored(product(weight, "MatMul", shared=True), {"0.weight": grid}, tmp_path)
    assert [node.op_type for node in found.graph.node] == ["MatMul", "Identity"]
    assert [tensor.name for tensor in found.graph.initializer] == ["0.weight"]


def test_a_weight_off_its_grid_is_refused(tmp_path: Path) -> None:
    weight, grid = on_grid(24, 96, 4, 32, symmetric=False)
    with pytest.raises(ExportFailed, match=r"0\.weight should be stored in 4 bits"):
        stored(product(weight * 1.1, "Gemm"), {"0.weight": grid}, tmp_path)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bits_are_packed_from_the_lowest_on(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 16)).astype(np.uint8)
    found = packed_bits(codes, bits)
    assert found.shape == (3, 16 * bits // 8)
    np.testing.assert_array_equal(unpacked(found, bits), codes)
    by_hand = sum(int(code) << (bits * place) for place, code in enumerate(codes[0, : 8 // bits]))
    assert found[0, 0] == by_hand


def context_of(make: Callable[[], nn.Module], folder: Path, shape: tuple[int, ...] = (64,)) -> Context:
    return context_for(tiny_model(copy.deepcopy(make()), shape=shape), digits_data(shape), folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_network_of_linear_layers_is_stored_in_few_bits(tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    context = context_of(mlp, tmp_path)
    context.model = replace(context.model, stored=dict.fromkeys(context.model.module.state_dict(), dtype))
    QuantizeTechnique().apply(WeightOnly(bits=bits, group_size=32, algorithm="rtn"), context)
    module = context.model.round_as_stored(context.model.module).eval()
    exported = write_onnx(module, context, tmp_path)
    proto = onnx.load(exported.path)
    assert sum(node.op_type == "MatMulNBits" for node in proto.graph.node) == 3
    assert {weight.name: weight.bits for weight in stored_weights(proto)} == dict.fromkeys(
        ("0.weight", "2.weight", "4.weight"), bits
    )
    assert context.feed is not None
    inputs = next(iter(context.feed.batches("test", 100))).inputs[0]
    with torch.no_grad():
        expected = module(inputs)
    difference = torch.from_numpy(run(proto, inputs.numpy())) - expected
    assert float(difference.norm() / expected.norm()) < 0.02


def test_convolutions_stay_floats(tmp_path: Path) -> None:
    context = context_of(convnet, tmp_path, (1, 8, 8))
    QuantizeTechnique().apply(WeightOnly(algorithm="rtn"), context)
    exported = write_onnx(context.model.module.eval(), context, tmp_path)
    bits = {weight.name: weight.bits for weight in stored_weights(onnx.load(exported.path))}
    assert bits.pop("8.weight") == 4
    assert set(bits.values()) == {32}


class Tied(nn.Module):
    """Token ids [batch, length] to scores of the next; the head is the embedding's weight, if `tied`."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 64)
        self.inner = nn.Linear(64, 64)
        self.head = nn.Linear(64, 50, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.inner(self.table(ids))))
        return found


def token_model(module: nn.Module) -> Model:
    model = tiny_model(module)
    inputs = (TensorFacts(name="input", shape=(None,), dtype="int64"),)
    return replace(model, facts=model.facts.model_copy(update={"inputs": inputs}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_embeddings_are_looked_up_in_codes(tmp_path: Path, bits: int, tied: bool) -> None:
    context = context_for(token_model(Tied(tied).eval()), None, tmp_path)
    step = WeightOnly.model_validate({"embeddings": bits, "algorithm": "rtn", "group_size": 32})
    details = QuantizeTechnique().apply(step, context)
    rows = {row["name"]: row["bits"] for row in details["layers"]}  # type: ignore[index,union-attr]
    assert rows == {"table.weight": bits, "inner.weight": 4} | ({} if tied else {"head.weight": 4})
    proto = onnx.load(write_onnx(context.model.module, context, tmp_path).path)
    onnx.checker.check_model(proto)
    kinds = [node.op_type for node in proto.graph.node]
    assert (kinds.count("GatherBlockQuantized"), kinds.count("MatMulNBits")) == (1, 2)
    assert not {"Gather", "MatMul", "Gemm", "Transpose"} & set(kinds)
    # The exporter has turned the small head round, and so it is there twice.
    assert sorted(weight.bits for weight in stored_weights(proto)) == sorted([bits, 4, bits if tied else 4])
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = context.model.module(ids).numpy()
    got = run(proto, ids.numpy())
    assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)


def test_embeddings_stay_floats_unless_asked_for(tmp_path: Path) -> None:
    module = Tied(tied=True).eval()
    before = module.table.weight.detach().clone()
    context = context_for(token_model(module), None, tmp_path)
    QuantizeTechnique().apply(WeightOnly(algorithm="rtn"), context)
    assert torch.equal(module.table.weight, before)


@pytest.mark.parametrize("kind", ["Gemm", "MatMul"])
def test_a_lookup_and_products_of_a_turned_weight_share_codes(tmp_path: Path, kind: str) -> None:
    """As large graphs have it: a table, and its transpose as the weight of the head."""
    weight, grid = on_grid(24, 96, 4, 32, symmetric=False)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "lookup"),
        helper.make_node("Transpose", ["table"], ["turned"], "turn", perm=[1, 0]),
        helper.make_node(kind, ["rows", "turned"], ["y"], "head"),
    ]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 24])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(weight, "table")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    found = stored(proto, {"table": grid}, tmp_path)
    assert [node.op_type for node in found.graph.node] == ["Reshape", "GatherBlockQuantized", "MatMulNBits"]
    (own,) = {one.name: one for one in stored_weights(found)}.values()
    np.testing.assert_array_equal(own.dequantized(), weight)
    (row,) = graph_layers(found, proto)
    assert (row.name, row.bits, row.parameters) == ("table", 4, 24 * 96)
    assert graph_parameters(found)[0] == 24 * 96
    ids = np.arange(10)
    expected, got = run(proto, ids), run(found, ids)
    assert np.linalg.norm(got - expected) < 0.012 * np.linalg.norm(expected)


@pytest.mark.parametrize("algorithm", ["rtn", "hqq"])
def test_a_batch_norm_that_is_folded_multiplies_steps(tmp_path: Path, algorithm: str) -> None:
    """Of either sign, and nothing where it has made an output nothing."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)).eval()
    with torch.no_grad():
        module[1].weight.copy_(torch.randn(32))  # type: ignore[operator,union-attr]
        module[1].weight[3] = 0.0  # type: ignore[index]
        module[1].running_var.uniform_(0.5, 2.0)  # type: ignore[operator,union-attr]
    context = context_for(tiny_model(module), digits_data(), tmp_path)
    QuantizeTechnique().apply(WeightOnly.model_validate({"algorithm": algorithm, "group_size": 32}), context)
    exported = write_onnx(context.model.module.eval(), context, tmp_path)
    proto = onnx.load(exported.path)
    assert {weight.name: weight.bits for weight in stored_weights(proto)} == {"0.weight": 4, "3.weight": 4}
    assert context.feed is not None
    inputs = next(iter(context.feed.batches("test", 100))).inputs[0]
    with torch.no_grad():
        expected = context.model.module(inputs).numpy()
    assert np.linalg.norm(run(proto, inputs.numpy()) - expected) < 0.02 * np.linalg.norm(expected)
