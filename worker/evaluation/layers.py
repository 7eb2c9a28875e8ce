"""Stored weights one by one: shape, sparsity, bits, and what quantization lost."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from app.contract.report import LayerReport
from worker.techniques.quantization.static.learned import TOLERANCE
from worker.techniques.quantization.stored import (
    MIN_WEIGHT_DIMENSIONS,
    StoredWeight,
    few_bits_helpers,
    recurrent_biases,
    scale_name,
    stored_weights,
)

FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
)
# 120 dB is the precision of float32 itself: more would print rounding noise as quality.
MAX_SQNR_DB = 120.0


def sqnr_db(signal: np.ndarray, approximation: np.ndarray) -> float:
    """Signal to quantization noise, 10 log10(sum s^2 / sum (s - a)^2), in decibels, at most MAX_SQNR_DB.

    A signal of zeros that is hit exactly counts as MAX_SQNR_DB, one that is missed as 0.
    """
    exact = signal.astype(np.float64)
    power = float(np.sum(exact**2))
    noise = float(np.sum((exact - approximation.astype(np.float64)) ** 2))
    if noise == 0:
        return MAX_SQNR_DB
    if power == 0:
        return 0.0
    return min(MAX_SQNR_DB, 10 * math.log10(power / noise))


def module_layers(module: nn.Module, stored: Mapping[str, torch.dtype]) -> tuple[LayerReport, ...]:
    """Every weight of at least two dimensions in a reloaded module, shared ones once; bits are those in the file.

    `stored` has the dtypes of the file where they are not the module's.
    """
    return tuple(
        LayerReport(
            name=name,
            shape=tuple(weight.shape),
            parameters=weight.numel(),
            sparsity=1 - int(weight.count_nonzero()) / weight.numel(),
            bits=8 * stored.get(name, weight.dtype).itemsize,
            sqnr_db=None,
        )
        for name, weight in module.named_parameters()
        if weight.ndim >= MIN_WEIGHT_DIMENSIONS and weight.numel()
    )


def graph_layers(proto: ModelProto, reference: ModelProto) -> tuple[LayerReport, ...]:
    """Every weight of an ONNX file; integers against the weight of the same name in `reference`, the float file."""
    originals = {weight.name: weight.values for weight in stored_weights(reference)}
    return tuple(weight_report(weight, originals.get(weight.name)) for weight in stored_weights(proto) if weight.size)


def graph_parameters(proto: ModelProto) -> tuple[int, int]:
    """How many weights and biases an ONNX file stores and how many of them are not zero; scales are neither."""
    biases = _biases(proto)
    weights = stored_weights(proto)
    total = sum(weight.size for weight in weights) + sum(bias.size for bias in biases)
    nonzero = sum(weight.size - weight.zeros() for weight in weights)
    return total, nonzero + sum(int(np.count_nonzero(bias)) for bias in biases)


def weight_report(weight: StoredWeight, original: np.ndarray | None) -> LayerReport:
    """One stored weight; integers against the floats that they stand for, the same way round."""
    sqnr = None
    # Weights of few bits lie on their grids in the float file too, and so do those that a training has left on grids of
    # 8: what was lost is in the step's details.
    if weight.scale is not None and original is not None and weight.few_bits is None:
        stood_for = weight.dequantized()
        off = np.abs(stood_for - original)
        on_grid = (off.T if weight.transposed else off) <= TOLERANCE * weight.scale
        sqnr = None if on_grid.all() else sqnr_db(original, stood_for)
    return LayerReport(
        name=weight.name,
        shape=weight.shape,
        parameters=weight.size,
        sparsity=weight.zeros() / weight.size,
        bits=weight.bits,
        sqnr_db=sqnr,
    )


def _biases(proto: ModelProto) -> list[np.ndarray]:
    """Vectors that take part in the computation: floats that are no scale, int32 that is dequantized; and the biases
    of recurrent layers, which ONNX stacks a row a direction."""
    helpers = {
        name
        for node in proto.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for name in node.input[1:]
    }
    helpers |= few_bits_helpers(proto.graph)
    products = [node for node in proto.graph.node if node.op_type == "MatMulInteger"]
    helpers |= {name for node in products for name in (*node.input[2:], scale_name(node.input[1]))}
    recurrent = recurrent_biases(proto.graph)
    integers = {node.input[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    return [
        numpy_helper.to_array(tensor)
        for tensor in proto.graph.initializer
        if tensor.name in recurrent
        or (
            len(tensor.dims) == 1
            and tensor.name not in helpers
            and (tensor.data_type in FLOATS or tensor.name in integers)
        )
    ]
