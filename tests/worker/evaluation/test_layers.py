from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

from app.contract.spec import Quantize
from tests.worker.conftest import OnnxExport
from tests.worker.nets import lenet
from worker.evaluation.layers import MAX_SQNR_DB, graph_layers, graph_parameters, module_layers, sqnr_db
from worker.techniques.quantization.onnx_int8 import quantize_file

LENET_PARAMETERS = 61_706
LENET_WEIGHTS = ["0.weight", "3.weight", "7.weight", "9.weight", "11.weight"]


@given(st.integers(0, 2**31), st.floats(0.001, 0.5))
def test_sqnr_of_known_noise(seed: int, share: float) -> None:
    """Noise that is orthogonal to the signal and `share` times as long: -20 log10(share)."""
    generator = np.random.default_rng(seed)
    signal = generator.normal(size=64)
    noise = generator.normal(size=64)
    noise -= signal * (noise @ signal) / (signal @ signal)
    noise *= share * np.linalg.norm(signal) / np.linalg.norm(noise)
    assert sqnr_db(signal, signal + noise) == pytest.approx(-20 * np.log10(share), abs=1e-6)


def test_sqnr_of_nothing_lost_and_of_silence() -> None:
    zeros = np.zeros(4, dtype=np.float32)
    assert sqnr_db(zeros + 1, zeros + 1) == MAX_SQNR_DB
    assert sqnr_db(zeros, zeros) == MAX_SQNR_DB
    assert sqnr_db(zeros, zeros + 1) == 0.0


def test_module_layers_count_zeros_and_shared_weights_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    with torch.no_grad():
        module[0].weight.fill_(1.0)[0, :3] = 0.0
    (layer,) = module_layers(module, {})
    assert (layer.name, layer.shape, layer.parameters, layer.bits) == ("0.weight", (4, 4), 16, 32)
    assert layer.sparsity == 3 / 16
    assert layer.sqnr_db is None


def test_float_graph_stores_what_the_module_has(lenet_float: Path) -> None:
    proto = onnx.load(lenet_float)
    layers = graph_layers(proto, proto)
    assert sorted(layer.name for layer in layers) == sorted(LENET_WEIGHTS)
    assert {layer.bits for layer in layers} == {32}
    assert {layer.sqnr_db for layer in layers} == {None}
    assert graph_parameters(proto)[0] == sum(p.numel() for p in lenet().parameters()) == LENET_PARAMETERS


def test_int8_graph_against_a_dequantization_by_hand(lenet_float: Path, lenet_int8: Path) -> None:
    """The classifier's weights: read from the raw initializers, scaled a row at a time."""
    proto = onnx.load(lenet_int8)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    exact = {t.name: numpy_helper.to_array(t) for t in onnx.load(lenet_float).graph.initializer}["11.weight"]
    stored, scale = arrays["11.weight_quantized"], arrays["11.weight_scale"]
    noise = exact - stored * scale[:, None]
    layer = {layer.name: layer for layer in graph_layers(proto, onnx.load(lenet_float))}["11.weight"]
    assert (layer.bits, layer.shape) == (8, (10, 84))
    assert layer.sqnr_db == pytest.approx(10 * np.log10((exact**2).sum() / (noise**2).sum()), abs=1e-3)
    assert layer.sqnr_db > 30


def test_floats_that_lie_on_the_steps_have_lost_nothing(lenet_float: Path, lenet_int8: Path) -> None:
    """As those of a training for integers do; within what folding a norm rounds in float32."""
    proto, floats = onnx.load(lenet_int8), onnx.load(lenet_float)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    on_grid = arrays["11.weight_quantized"] * arrays["11.weight_scale"][:, None] * np.float32(1 + 1e-7)
    held = next(tensor for tensor in floats.graph.initializer if tensor.name == "11.weight")
    held.CopyFrom(numpy_helper.from_array(on_grid.astype(np.float32), "11.weight"))
    found = {layer.name: layer.sqnr_db for layer in graph_layers(proto, floats)}
    assert found["11.weight"] is None
    assert (found["9.weight"] or 0) > 30


def test_int8_graph_counts_weights_and_biases_but_no_scales(lenet_int8: Path) -> None:
    total, nonzero = graph_parameters(onnx.load(lenet_int8))
    assert total == LENET_PARAMETERS
    assert 0.8 * total < nonzero < total  # weights near zero became zero


def test_dynamic_graph_is_judged_although_it_stores_transposes(lenet_float: Path, tmp_path: Path) -> None:
    target = tmp_path / "dynamic.onnx"
    quantize_file(lenet_float, target, Quantize(method="dynamic"), None, ())
    layers = {layer.name: layer for layer in graph_layers(onnx.load(target), onnx.load(lenet_float))}
    assert sorted(layers) == sorted(LENET_WEIGHTS)
    assert [layers[name].bits for name in LENET_WEIGHTS] == [32, 32, 8, 8, 8]
    assert layers["7.weight"].shape == (400, 120)
    assert all((layers[name].sqnr_db or 0) > 30 for name in LENET_WEIGHTS[2:])
    assert graph_parameters(onnx.load(target))[0] == LENET_PARAMETERS


def test_bits_are_those_of_the_file() -> None:
    (layer,) = module_layers(nn.Sequential(nn.Linear(4, 4)), {"0.weight": torch.float16})
    assert layer.bits == 16


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_biases_count_as_in_the_module(name: str, zoo: Callable[[str], OnnxExport]) -> None:
    export = zoo(name)
    total, _ = graph_parameters(onnx.load(export.path))
    assert total == sum(parameter.numel() for parameter in export.model.module.parameters())
