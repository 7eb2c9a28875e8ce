"""Every operator that can be imported, with its builder: one explicit table, so that nothing is found by accident."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from worker.loading.onnx_ops import (
    attention,
    convolution,
    elementwise,
    indexing,
    linear,
    normalization,
    recurrent,
    reduction,
    resize,
    shapes,
)
from worker.loading.onnx_ops.node import Node
from worker.vetting.onnx import CONTRIB

Build: TypeAlias = Callable[[Node], Any]
"""Imports one node: returns its value, or a sequence with one value an output."""


def values(function: Callable[..., Any]) -> Build:
    """A function of all inputs as they come."""
    return lambda node: node.call(function, *node.values())


def one_tensor(function: Callable[..., Any]) -> Build:
    """A function of one tensor."""
    return lambda node: node.call(function, node.tensor(0))


ELEMENTWISE: dict[str, Build] = {
    "Add": linear.build_add,
    "Sub": values(elementwise.sub),
    "Mul": values(elementwise.mul),
    "Div": values(elementwise.div),
    "Mod": elementwise.build_mod,
    "Pow": values(elementwise.pow_),
    "Max": values(elementwise.maximum),
    "Min": values(elementwise.minimum),
    "Sum": values(elementwise.total),
    "Mean": values(elementwise.mean),
    "Equal": values(elementwise.equal),
    "Greater": values(elementwise.greater),
    "GreaterOrEqual": values(elementwise.greater_or_equal),
    "Less": values(elementwise.less),
    "LessOrEqual": values(elementwise.less_or_equal),
    "And": values(elementwise.and_),
    "Or": values(elementwise.or_),
    "Xor": values(elementwise.xor),
    "Not": values(elementwise.not_),
    "Where": values(elementwise.where),
    "Clip": elementwise.build_clip,
    "Cast": elementwise.build_cast,
    "CastLike": values(elementwise.cast_like),
    "Identity": values(elementwise.identity),
    "Neg": values(elementwise.neg),
    "Abs": values(elementwise.absolute),
    "Floor": values(elementwise.floor),
    "Ceil": values(elementwise.ceil),
    "Round": values(elementwise.round_),
    "Sqrt": values(elementwise.sqrt),
    "Reciprocal": values(elementwise.reciprocal),
    "CumSum": elementwise.build_cumsum,
    "IsInf": elementwise.build_isinf,
    "IsNaN": one_tensor(torch.isnan),
}

FUNCTIONS: dict[str, Build] = {
    name: one_tensor(function)
    for name, function in {
        "Acos": torch.acos,
        "Acosh": torch.acosh,
        "Asin": torch.asin,
        "Asinh": torch.asinh,
        "Atan": torch.atan,
        "Atanh": torch.atanh,
        "Cos": torch.cos,
        "Cosh": torch.cosh,
        "Erf": torch.erf,
        "Exp": torch.exp,
        "Log": torch.log,
        "Sign": torch.sign,
        "Sin": torch.sin,
        "Sinh": torch.sinh,
        "Tan": torch.tan,
        "Tanh": torch.tanh,
        "Relu": torch.relu,
        "Sigmoid": torch.sigmoid,
        "Softplus": functional.softplus,
        "Softsign": functional.softsign,
        "HardSwish": functional.hardswish,
        "Mish": functional.mish,
    }.items()
}

ACTIVATIONS: dict[str, Build] = {
    "LeakyRelu": elementwise.activation(elementwise.leaky_relu, alpha=0.01),
    "Elu": elementwise.activation(elementwise.elu, alpha=1.0),
    "Celu": elementwise.activation(elementwise.celu, alpha=1.0),
    "Selu": elementwise.activation(elementwise.selu, alpha=1.6732632423543772, gamma=1.0507009873554805),
    "ThresholdedRelu": elementwise.activation(elementwise.thresholded_relu, alpha=1.0),
    "HardSigmoid": elementwise.activation(elementwise.hard_sigmoid, alpha=0.2, beta=0.5),
    "Gelu": elementwise.build_gelu,
    "PRelu": elementwise.build_prelu,
    "Softmax": normalization.build_softmax,
    "LogSoftmax": normalization.build_softmax,
    "Hardmax": normalization.build_hardmax,
}

LAYERS: dict[str, Build] = {
    "Conv": convolution.build_conv,
    "ConvTranspose": convolution.build_conv_transpose,
    "MaxPool": convolution.build_max_pool,
    "AveragePool": convolution.build_average_pool,
    "GlobalAveragePool": one_tensor(convolution.global_average),
    "GlobalMaxPool": one_tensor(convolution.global_max),
    "LRN": convolution.build_local_response,
    "MatMul": linear.build_matmul,
    "Gemm": linear.build_gemm,
    "Einsum": linear.build_einsum,
    "BatchNormalization": normalization.build_batch_norm,
    "InstanceNormalization": normalization.build_instance_norm,
    "LayerNormalization": normalization.build_layer_norm,
    "RMSNormalization": normalization.build_rms_norm,
    "GroupNormalization": normalization.build_group_norm,
    "LpNormalization": normalization.build_lp_norm,
    "MeanVarianceNormalization": normalization.build_mean_variance,
    "Dropout": normalization.build_dropout,
    "LSTM": recurrent.build_recurrent,
    "GRU": recurrent.build_recurrent,
    "RNN": recurrent.build_recurrent,
    "Attention": attention.build_attention,
    "RotaryEmbedding": attention.build_rotary,
}

SHAPES: dict[str, Build] = {
    "Shape": shapes.build_shape,
    "Size": shapes.build_size,
    "Reshape": shapes.build_reshape,
    "Flatten": shapes.build_flatten,
    "Transpose": shapes.build_transpose,
    "Squeeze": shapes.build_squeeze,
    "Unsqueeze": shapes.build_unsqueeze,
    "Concat": shapes.build_concat,
    "Split": shapes.build_split,
    "Slice": indexing.build_slice,
    "Gather": indexing.build_gather,
    "GatherElements": indexing.build_gather_elements,
    "GatherND": indexing.build_gather_nd,
    "Scatter": indexing.build_scatter_elements,
    "ScatterElements": indexing.build_scatter_elements,
    "ScatterND": indexing.build_scatter_nd,
    "Expand": values(shapes.expand),
    "Tile": values(shapes.tile),
    "ConstantOfShape": shapes.build_constant_of_shape,
    "Range": shapes.build_range,
    "OneHot": indexing.build_one_hot,
    "Pad": indexing.build_pad,
    "Trilu": shapes.build_trilu,
    "EyeLike": shapes.build_eye_like,
    "DepthToSpace": shapes.build_depth_to_space,
    "SpaceToDepth": shapes.build_space_to_depth,
    "Resize": resize.build_resize,
    "Upsample": resize.build_upsample,
}

REDUCTIONS: dict[str, Build] = {
    **dict.fromkeys(
        (
            *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
            *("ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"),
        ),
        reduction.build_reduce,
    ),
    "ArgMax": reduction.build_extreme_place,
    "ArgMin": reduction.build_extreme_place,
    "TopK": reduction.build_top,
}

# ONNX Runtime's own, by domain and name.
CONTRIBUTED: dict[str, Build] = {
    f"{CONTRIB}.Gelu": elementwise.build_gelu,
    f"{CONTRIB}.BiasGelu": values(elementwise.bias_gelu),
    f"{CONTRIB}.FastGelu": values(elementwise.fast_gelu),
    f"{CONTRIB}.QuickGelu": elementwise.activation(elementwise.quick_gelu, alpha=1.702),
    f"{CONTRIB}.FusedMatMul": linear.build_fused_matmul,
}

TABLE: dict[str, Build] = {
    **ELEMENTWISE,
    **FUNCTIONS,
    **ACTIVATIONS,
    **LAYERS,
    **SHAPES,
    **REDUCTIONS,
    **CONTRIBUTED,
}
