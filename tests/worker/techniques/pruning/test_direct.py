"""Weights of ONNX graphs that run as they are: patterns lie along their inputs, whichever way the graph holds them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from app.contract.codebook import Codebook
from app.contract.pruning import Prune
from worker.constraints import baked
from worker.loading.onnx_direct import DirectModule
from worker.techniques.pruning.choosing import drop_groups
from worker.techniques.pruning.prune import fitting
from worker.techniques.pruning.scores_math import magnitude
from worker.techniques.pruning.weights import WeightSet, prunable
from worker.techniques.quantization.codebook import _impose


def graph() -> onnx.ModelProto:
    """x [n, 8] times a matrix, by Gemm as torch holds it, behind a Transpose, and by a transposed convolution."""
    random = np.random.default_rng(0)
    sizes = {"plain": (8, 12), "gemm": (16, 12), "turned": (4, 16), "conv": (4, 8, 2, 2)}
    weights = [
        numpy_helper.from_array(random.normal(size=size).astype(np.float32), name) for name, size in sizes.items()
    ]
    weights.append(numpy_helper.from_array(np.array([-1, 4, 1, 1], np.int64), "shape"))
    nodes = [
        helper.make_node("MatMul", ["x", "plain"], ["a"]),
        helper.make_node("Gemm", ["a", "gemm"], ["b"], transB=1),
        helper.make_node("Transpose", ["turned"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["b", "t"], ["c"]),
        helper.make_node("Reshape", ["c", "shape"], ["d"]),
        helper.make_node("ConvTranspose", ["d", "conv"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 8), ("y", 8))]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto, full_check=True)
    return proto


# The axis of the inputs of each weight, by the definition of its operator.
INPUTS = {"plain": 0, "gemm": 1, "turned": 1, "conv": 0}


@pytest.fixture
def module() -> DirectModule:
    return DirectModule(graph(), ("x",), "logits", single=False)


def test_n_of_m_lies_along_the_inputs(module: DirectModule) -> None:
    step = Prune(granularity="2:4")
    weights = WeightSet(module, fitting(step, prunable(module)))
    drop_groups(step, weights, [magnitude(value) for value in weights.values()])
    state = baked(module).state_dict()
    assert {name.removesuffix(".weight") for name in state} == set(INPUTS)
    for name, axis in INPUTS.items():
        groups = state[f"{name}.weight"].movedim(axis, -1).reshape(-1, 4)
        assert bool((groups.count_nonzero(1) == 2).all()), name
    outputs = module(torch.randn(3, 8))
    assert outputs.shape == (3, 8)


def test_values_can_be_shared_too(module: DirectModule) -> None:
    for weight in prunable(module):
        _impose(Codebook(entries=4), WeightSet(module, [weight]), weight, np.random.default_rng(0))
    for value in baked(module).state_dict().values():
        assert len(torch.unique(value)) <= 4
    assert bool(module(torch.randn(3, 8)).isfinite().all())
