"""Narrow floats in ONNX graphs: what is stored, what ONNX Runtime computes with it, and what stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tests.worker.helpers import convnet, mlp, tiny_model
from tests.worker.loading.onnx_files import model, noise, run
from tests.worker.nets import Recurrent, text_model
from worker.evaluation.layers import graph_layers, graph_parameters
from worker.export.onnx import export_onnx
from worker.loading.onnx_check import computes_in_half
from worker.loading.onnx_narrow import TYPES, channel_factors, store_float8, store_narrow
from worker.model import Model
from worker.techniques.quantization.float8_math import nearest, row_scales

HALVES = (torch.float16, torch.bfloat16)


def rounded(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """With every float a value of the type."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))
    return module.eval()


def exported(own: Model, folder: Path) -> ModelProto:
    return onnx.load(export_onnx(own.module, own, folder / "float.onnx"))


def kinds(proto: ModelProto) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in proto.graph.initializer}


def operators_when_loaded(proto: ModelProto, folder: Path) -> list[str]:
    """Of the graph that ONNX Runtime makes of it."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize("dtype", HALVES)
def test_the_file_is_half_and_computes_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    own = tiny_model(rounded(mlp(), dtype))
    proto = exported(own, tmp_path)
    before, inputs = proto.ByteSize(), noise(3, 64)
    expected, layers, counts = run(proto, {"input": inputs}), graph_layers(proto, proto), graph_parameters(proto)
    store_narrow(proto, dtype, own.module.state_dict())
    onnx.checker.check_model(proto, full_check=True)
    assert {name: kinds(proto)[name] for name in kinds(proto) if name.endswith("weight")} == dict.fromkeys(
        ("0.weight", "2.weight", "4.weight"), TYPES[dtype]
    )
    assert proto.ByteSize() < 0.56 * before  # the rest are the graph and short biases
    np.testing.assert_array_equal(run(proto, {"input": inputs}), expected)
    assert "Cast" not in operators_when_loaded(proto, tmp_path)
    assert not computes_in_half(proto)
    assert graph_parameters(proto) == counts
    assert [(layer.name, layer.bits) for layer in graph_layers(proto, proto)] == [(one.name, 16) for one in layers]


def test_what_the_type_does_not_hold_and_what_is_short_stays(tmp_path: Path) -> None:
    module = rounded(mlp(), torch.float16)
    with torch.no_grad():
        module[2].weight[0, 0] = 1e6  # type: ignore[index]
        module[4].weight[0, 0] = 0.1  # type: ignore[index]
    own = tiny_model(module)
    proto = exported(own, tmp_path)
    store_narrow(proto, torch.float16, own.module.state_dict())
    found = kinds(proto)
    assert (found["0.weight"], found["2.weight"], found["4.weight"]) == (TensorProto.FLOAT16, 1, 1)
    assert found["4.bias"] == TensorProto.FLOAT  # ten numbers: a Cast is longer


@pytest.mark.parametrize("dtype", HALVES)
def test_a_folded_batch_norm_is_multiplied_in_again(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Conv2d(4, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 10))
    nn.init.uniform_(module[1].running_var, 0.2, 3.0)  # type: ignore[arg-type]
    nn.init.normal_(module[1].weight)  # type: ignore[arg-type]
    own = tiny_model(rounded(module, dtype), shape=(4, 8, 8))
    proto = exported(own, tmp_path)
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    inputs = noise(2, 4, 8, 8)
    expected = run(proto, {"input": inputs})
    store_narrow(proto, dtype, own.module.state_dict())
    assert kinds(proto)["0.weight"] == TYPES[dtype]
    held = next(one for one in proto.graph.initializer if one.name == "0.weight")
    assert np.array_equal(numpy_helper.to_array(held).astype(np.float32), own.module[0].weight.detach().numpy())
    np.testing.assert_allclose(run(proto, {"input": inputs}), expected, rtol=1e-5, atol=1e-5)
    assert set(operators_when_loaded(proto, tmp_path)).isdisjoint({"Cast", "Mul"})
    assert [(layer.name, layer.bits) for layer in graph_layers(proto, proto)] == [("0.weight", 16), ("4.weight", 16)]


def test_factors_by_hand() -> None:
    weight = np.array([[1.0, -2.0], [0.5, 4.0], [0.0, 0.0]], np.float32)
    product = weight * np.array([[3.0], [-0.25], [7.0]], np.float32)
    found = channel_factors(product, weight, 0)
    assert found is not None
    assert found.shape == (3, 1)
    assert found[:2, 0].tolist() == [3.0, -0.25]
    assert channel_factors(product, weight, 1) is None
    product[0, 0] += 1e-3
    assert channel_factors(product, weight, 0) is None


def test_recurrent_biases_are_no_weights(tmp_path: Path) -> None:
    own = text_model(rounded(Recurrent(nn.LSTM), torch.bfloat16), classes=4)
    proto = exported(own, tmp_path)
    names, counts = [layer.name for layer in graph_layers(proto, proto)], graph_parameters(proto)
    store_narrow(proto, torch.bfloat16, own.module.state_dict())
    layers = graph_layers(proto, proto)
    assert [layer.name for layer in layers] == names
    assert {layer.bits for layer in layers} == {16}
    assert graph_parameters(proto) == counts


def branching(opset: int, node: bool) -> ModelProto:
    """An If whose branches read a weight of the graph around them, which a Constant node may hold."""
    weight = (np.arange(400, dtype=np.float32) - 200).reshape(20, 20) / 4
    branches = {
        name: helper.make_graph(
            [helper.make_node(operator, ["x", "w"], ["z"])], name, [], [helper.make_empty_tensor_value_info("z")]
        )
        for name, operator in (("then_branch", "MatMul"), ("else_branch", "Add"))
    }
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["yes"], to=TensorProto.BOOL),
        helper.make_node("If", ["yes"], ["y"], **branches),  # type: ignore[arg-type]
    ]
    if node:
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight)))
    return model(nodes, {"x": [20, 20]}, {} if node else {"w": weight}, opset=opset)


@pytest.mark.parametrize("node", [False, True])
def test_branches_read_it_too(node: bool) -> None:
    proto, inputs = branching(20, node), noise(20, 20)
    expected = run(proto, {"x": inputs})
    before = proto.ByteSize()
    store_narrow(proto, torch.float16, {})
    assert proto.ByteSize() < before - 600
    np.testing.assert_array_equal(run(proto, {"x": inputs}), expected)


def test_old_versions_know_no_bfloat16() -> None:
    proto = branching(12, node=False)
    before = proto.SerializeToString()
    store_narrow(proto, torch.bfloat16, {})
    assert proto.SerializeToString() == before
    store_narrow(proto, torch.float16, {})
    assert kinds(proto)["w"] == TensorProto.FLOAT16


def of_float8(module: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    """With its matrices and kernels moved to float8 times a scale an output; and the scales."""
    scales = {}
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            rows = weight.detach().flatten(1)
            own = row_scales(rows, dtype)
            weight.data = nearest(rows, own, dtype).reshape(weight.shape)
            scales[name] = own.reshape(-1, *[1] * (weight.ndim - 1))
    return module.eval(), scales


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (mlp(), (64,)),
        (convnet(), (1, 8, 8)),
        (nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5)), (3, 16)),  # products turned round
        (nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(576, 10)), (8, 8, 8)),
    ],
)
def test_float8_is_stored_in_a_byte_and_computes_the_same(
    tmp_path: Path, module: nn.Module, shape: tuple[int, ...]
) -> None:
    module, scales = of_float8(module)
    own = tiny_model(module, shape=shape)
    proto = exported(own, tmp_path)
    inputs, counts = noise(2, *shape), graph_parameters(proto)
    expected, names = run(proto, {"input": inputs}), [layer.name for layer in graph_layers(proto, proto)]
    store_float8(proto, scales, own.module.state_dict(), {})
    onnx.checker.check_model(proto, full_check=True)
    np.testing.assert_allclose(run(proto, {"input": inputs}), expected, rtol=1e-5, atol=1e-5)
    assert set(operators_when_loaded(proto, tmp_path)).isdisjoint({"Cast", "Mul", "DequantizeLinear"})
    layers = graph_layers(proto, proto)
    assert [layer.name for layer in layers] == names
    assert {kinds(proto)[name] for name in scales if scales[name].numel() > 5} == {TensorProto.FLOAT8E4M3FN}
    assert {layer.bits for layer in layers if layer.parameters > 200} == {8}
    assert all(layer.sqnr_db is None for layer in layers)
    assert graph_parameters(proto) == counts


def test_float8_of_an_upload_in_bfloat16_is_rounded_as_it_is(tmp_path: Path) -> None:
    module, scales = of_float8(mlp(), torch.bfloat16)
    own = tiny_model(module)
    proto = exported(own, tmp_path)
    inputs = noise(2, 64)
    expected = run(proto, {"input": inputs})
    store_float8(proto, scales, own.module.state_dict(), dict.fromkeys(scales, torch.bfloat16))
    assert kinds(proto)["0.weight"] == TensorProto.FLOAT8E4M3FN
    np.testing.assert_array_equal(run(proto, {"input": inputs}), expected)


def test_float8_of_a_graph_in_float64_computes_the_same() -> None:
    """Whose weights are values of float32 by then, as every module has them."""
    module, scales = of_float8(nn.Sequential(nn.Linear(40, 30, bias=False)), torch.float64)
    weight = module[0].weight.detach()  # type: ignore[index]
    nodes = [helper.make_node("Gemm", ["x", "0.weight"], ["y"], transB=1)]
    inputs = {"x": noise(3, 40).astype(np.float64)}
    proto = model(nodes, dict(inputs), {"0.weight": weight.double().numpy()})
    expected = run(proto, inputs)
    store_float8(proto, scales, module.state_dict(), {"0.weight": torch.float64})
    assert kinds(proto)["0.weight"] == TensorProto.FLOAT8E4M3FN
    onnx.checker.check_model(proto, full_check=True)
    found = run(proto, inputs)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, expected)
