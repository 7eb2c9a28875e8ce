"""Every operator of the table against ONNX Runtime, in the opsets where its meaning or its form changed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto

from tests.worker.loading.onnx_files import Array, Const, axes, const, noise, one_node, run
from worker.loading.onnx_graph import NotImportable, import_graph
from worker.loading.onnx_ops.errors import Unsupported
from worker.loading.onnx_ops.table import TABLE

OLDEST, LATEST = 9, 23
X = noise(2, 3, 4)
PICTURE = noise(2, 4, 7, 6)
SIGNAL = noise(2, 4, 9)
VOLUME = noise(2, 2, 4, 5, 4)
POSITIVE = np.abs(X) + 0.1
IDS = np.array([[0, 2, 1], [3, 1, 0]])
TABLE_OF_IDS = const(noise(5, 4))
BOOLS = X > 0


@dataclass(frozen=True)
class Case:
    """One operator on the given inputs, in the given opsets."""

    op: str
    inputs: tuple[Array | Const | None, ...]
    opsets: tuple[int, ...] = (OLDEST, LATEST)
    outputs: int = 1
    domain: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)


def case(op: str, *inputs: Array | Const | None, opsets: tuple[int, ...] = (OLDEST, LATEST), **attributes: Any) -> Case:
    outputs, domain = attributes.pop("outputs", 1), attributes.pop("domain", "")
    return Case(op, inputs, opsets, outputs, domain, attributes)


def unary() -> list[Case]:
    everywhere = ("Abs", "Ceil", "Erf", "Exp", "Floor", "Identity", "Neg", "Sigmoid", "Sign", "Tanh", "Relu", "Atan")
    everywhere += ("Sin", "Cos", "Tan", "Sinh", "Cosh", "Asinh", "Softplus", "Softsign")
    within = {"Acos": X.clip(-0.9, 0.9), "Asin": X.clip(-0.9, 0.9), "Atanh": X.clip(-0.9, 0.9), "Acosh": POSITIVE + 1}
    positive = ("Sqrt", "Log", "Reciprocal")
    return [
        *(case(op, X) for op in everywhere),
        *(case(op, array) for op, array in within.items()),
        *(case(op, POSITIVE) for op in positive),
        case("Round", X * 4, opsets=(11, LATEST)),
        case("Not", BOOLS),
        case("IsNaN", np.where(BOOLS, np.nan, X).astype(np.float32)),
        case("IsInf", np.where(BOOLS, np.inf, X).astype(np.float32), opsets=(10, 20)),
        case("IsInf", np.where(BOOLS, np.inf, -np.inf).astype(np.float32), opsets=(10, 20), detect_negative=0),
        case("IsInf", np.where(BOOLS, np.inf, -np.inf).astype(np.float32), opsets=(10, 20), detect_positive=0),
        case("Elu", X, alpha=0.7),
        case("Celu", X, opsets=(12, LATEST), alpha=0.7),
        case("Selu", X),
        case("LeakyRelu", X, alpha=0.2),
        case("ThresholdedRelu", X, opsets=(10, LATEST), alpha=0.3),
        case("HardSigmoid", X, alpha=0.3, beta=0.4),
        case("HardSwish", X, opsets=(14, LATEST)),
        case("Mish", X, opsets=(18, LATEST)),
        case("Gelu", X, opsets=(20, LATEST)),
        case("Gelu", X, opsets=(20,), approximate="tanh"),
        case("Cast", X * 3, to=TensorProto.INT64),
        case("Cast", IDS, to=TensorProto.FLOAT),
        case("Cast", X, to=TensorProto.BOOL),
        case("CastLike", IDS, X, opsets=(15, LATEST)),
    ]


def binary() -> list[Case]:
    y = noise(2, 3, 4, seed=1)
    return [
        *(case(op, X, y) for op in ("Add", "Sub", "Mul", "Div")),
        *(case(op, X, const(2.5)) for op in ("Add", "Sub", "Mul", "Div")),
        *(case(op, const(2.5), POSITIVE) for op in ("Add", "Sub", "Mul", "Div")),
        *(case(op, X, const(noise(4))) for op in ("Add", "Sub", "Mul", "Div")),
        case("Div", IDS * 7 - 9, const(4, "int64")),
        case("Mod", IDS * 7 - 9, const(4, "int64"), opsets=(10, LATEST)),
        case("Mod", X, const(0.7), opsets=(10, LATEST), fmod=1),
        case("Pow", POSITIVE, const(1.5), opsets=(OLDEST, 12, LATEST)),
        case("Pow", X, const(2, "int64"), opsets=(12, LATEST)),
        *(case(op, X, y, POSITIVE) for op in ("Max", "Min", "Sum", "Mean")),
        case("Max", X, const(0.1)),
        *(case(op, X, y) for op in ("Greater", "Less")),
        *(case(op, X, y, opsets=(12, 16, LATEST)) for op in ("GreaterOrEqual", "LessOrEqual")),
        case("Equal", IDS, const([[0, 2, 2]], "int64"), opsets=(11, LATEST)),
        *(case(op, BOOLS, y > 0) for op in ("And", "Or", "Xor")),
        case("Where", BOOLS, X, y),
        case("Where", BOOLS, X, const(-1e9)),
        case("Clip", X, opsets=(OLDEST, 10), min=-0.5, max=0.25),
        case("Clip", X, const(-0.5), const(0.25), opsets=(11, 12, 13, LATEST)),
        case("Clip", X, None, const(0.25), opsets=(11, LATEST)),
        case("PRelu", PICTURE, const(noise(4, 1, 1))),
        case("PRelu", PICTURE, const([0.3])),
        case("PRelu", X, const(noise(3, 4))),
        case("CumSum", X, const(1, "int64"), opsets=(11, LATEST)),
        case("CumSum", X, const(2, "int64"), opsets=(11,), exclusive=1, reverse=1),
        case("BiasGelu", X, const(noise(4)), opsets=(20,), domain="com.microsoft"),
        case("FastGelu", X, const(noise(4)), opsets=(20,), domain="com.microsoft"),
        case("Gelu", X, opsets=(17,), domain="com.microsoft"),
        case("QuickGelu", X, opsets=(17,), domain="com.microsoft"),
    ]


def linear() -> list[Case]:
    weight, bias = noise(4, 5, seed=2), noise(5, seed=3)
    rows = noise(2, 4)
    return [
        case("MatMul", X, const(weight)),
        case("MatMul", rows, const(weight)),
        case("MatMul", const(noise(5, 3)), X),
        case("MatMul", X, np.swapaxes(X, 1, 2).copy()),
        case("MatMul", X, const(noise(2, 4, 3))),
        case("Gemm", rows, const(weight), const(bias), opsets=(OLDEST, 11, 13, LATEST)),
        case("Gemm", rows, const(weight.T.copy()), const(bias), transB=1),
        case("Gemm", rows, const(weight), const(bias), alpha=0.5, beta=2.0),
        case("Gemm", rows, const(weight), const([[0.5], [1.0]])),
        case("Gemm", rows, const(weight), const(0.5)),
        case("Gemm", rows, const(weight), opsets=(11, LATEST)),
        case("Gemm", rows.T.copy(), noise(4, 5), opsets=(11,), transA=1),
        case("Einsum", X, const(weight), opsets=(12, LATEST), equation="bij,jk->bik"),
        case("FusedMatMul", X, const(noise(5, 4)), opsets=(17,), domain="com.microsoft", transB=1, alpha=0.3),
    ]


def convolutions() -> list[Case]:
    kernel = const(noise(6, 4, 3, 3, seed=4))
    return [
        case("Conv", PICTURE, kernel, opsets=(OLDEST, 11, 22, LATEST)),
        case("Conv", PICTURE, kernel, const(noise(6)), pads=[1, 1, 1, 1], strides=[2, 2]),
        case("Conv", PICTURE, kernel, pads=[0, 1, 2, 1]),
        case("Conv", PICTURE, kernel, dilations=[2, 1]),
        case("Conv", PICTURE, const(noise(8, 2, 3, 3)), group=2),
        case("Conv", PICTURE, const(noise(4, 1, 3, 3)), group=4),
        *(case("Conv", PICTURE, kernel, auto_pad=pad, strides=[2, 1]) for pad in ("SAME_UPPER", "SAME_LOWER", "VALID")),
        case("Conv", SIGNAL, const(noise(3, 4, 3)), pads=[2, 1]),
        case("Conv", VOLUME, const(noise(3, 2, 2, 3, 2)), const(noise(3))),
        case("ConvTranspose", PICTURE, const(noise(4, 3, 3, 3)), opsets=(OLDEST, 11, LATEST)),
        case("ConvTranspose", PICTURE, const(noise(4, 3, 3, 3)), const(noise(3)), strides=[2, 2], pads=[1, 1, 1, 1]),
        case("ConvTranspose", PICTURE, const(noise(4, 3, 3, 3)), strides=[2, 2], pads=[0, 1, 1, 0]),
        case("ConvTranspose", PICTURE, const(noise(4, 3, 3, 3)), strides=[2, 2], output_padding=[1, 1]),
        case("ConvTranspose", PICTURE, const(noise(4, 2, 3, 3)), group=2, dilations=[2, 2]),
        case("ConvTranspose", PICTURE, const(noise(4, 3, 3, 3)), strides=[2, 2], output_shape=[14, 12]),
        case("ConvTranspose", PICTURE, const(noise(4, 3, 3, 3)), strides=[2, 2], auto_pad="SAME_UPPER"),
        case("ConvTranspose", SIGNAL, const(noise(4, 3, 4)), strides=[3]),
        case("MaxPool", PICTURE, opsets=(OLDEST, 10, 11, 12, LATEST), kernel_shape=[2, 2], strides=[2, 2]),
        case("MaxPool", PICTURE, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
        case("MaxPool", PICTURE, kernel_shape=[3, 3], pads=[0, 1, 2, 1]),
        case("MaxPool", PICTURE, opsets=(10, LATEST), kernel_shape=[3, 2], strides=[2, 2], ceil_mode=1),
        case("MaxPool", PICTURE, opsets=(10, LATEST), kernel_shape=[2, 2], dilations=[2, 2]),
        case("MaxPool", PICTURE, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
        case("MaxPool", SIGNAL, kernel_shape=[3]),
        case("MaxPool", VOLUME, kernel_shape=[2, 2, 2]),
        case("AveragePool", PICTURE, opsets=(OLDEST, 10, 11, 19, LATEST), kernel_shape=[2, 3], strides=[2, 2]),
        case("AveragePool", PICTURE, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        case("AveragePool", PICTURE, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        case("AveragePool", PICTURE, kernel_shape=[3, 3], pads=[0, 1, 1, 0]),
        case("AveragePool", PICTURE, kernel_shape=[3, 3], pads=[0, 1, 1, 0], count_include_pad=1),
        case("AveragePool", PICTURE, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_LOWER"),
        case("AveragePool", SIGNAL, kernel_shape=[4], strides=[3]),
        case("GlobalAveragePool", PICTURE),
        case("GlobalMaxPool", PICTURE),
        case("LRN", PICTURE, size=3, alpha=0.1, beta=0.6, bias=2.0),
    ]


def normalizations() -> list[Case]:
    channels = [const(np.abs(noise(4, seed=i)) + 0.5) for i in range(4)]
    row = (const(noise(4, seed=1)), const(noise(4, seed=2)))
    return [
        case("BatchNormalization", PICTURE, *channels, opsets=(OLDEST, 14, 15, LATEST), epsilon=1e-3),
        case("BatchNormalization", SIGNAL, *channels),
        case("BatchNormalization", noise(2, 4), *channels),
        case("InstanceNormalization", PICTURE, *channels[:2], opsets=(OLDEST, LATEST), epsilon=1e-3),
        case("LayerNormalization", X, *row, opsets=(17, LATEST), epsilon=1e-3),
        case("LayerNormalization", X, row[0], opsets=(17,)),
        case("LayerNormalization", X, const(noise(3, 4)), const(noise(3, 4)), opsets=(17,), axis=1),
        case("RMSNormalization", X, row[0], opsets=(23,), epsilon=1e-3),
        case("GroupNormalization", PICTURE, *channels[:2], opsets=(21, LATEST), num_groups=2),
        case("LpNormalization", X, axis=1),
        case("LpNormalization", X, p=1),
        case("MeanVarianceNormalization", PICTURE),
        case("Dropout", X, opsets=(OLDEST, 10), ratio=0.5),
        case("Dropout", X, const(0.5), opsets=(12, 13, LATEST)),
        *(case(op, X, opsets=(OLDEST, 11, 13, LATEST)) for op in ("Softmax", "LogSoftmax")),
        *(case(op, X, opsets=(OLDEST, 13), axis=2) for op in ("Softmax", "LogSoftmax")),
        case("Softmax", X, opsets=(OLDEST, 13), axis=1),
        case("Hardmax", X, opsets=(13, LATEST)),
        case("Hardmax", noise(2, 4), opsets=(OLDEST, 11)),
    ]


def reductions() -> list[Case]:
    names = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare")
    names += ("ReduceLogSum", "ReduceLogSumExp")
    return [
        *(case(op, POSITIVE, opsets=(OLDEST, 11, 13), axes=[1, -1]) for op in names),
        *(case(op, POSITIVE, axes(1), opsets=(18, LATEST), keepdims=0) for op in names),
        case("ReduceMean", X, opsets=(13, 18), keepdims=0),
        case("ReduceSum", X, opsets=(OLDEST, 11), axes=[1], keepdims=0),
        case("ReduceSum", X, axes(1, 2), opsets=(13, LATEST)),
        case("ReduceSum", X, opsets=(13,), noop_with_empty_axes=1),
        *(case(op, X, opsets=(OLDEST, 11, 13), axis=1) for op in ("ArgMax", "ArgMin")),
        case("ArgMax", np.round(X), opsets=(12, LATEST), axis=1, keepdims=0, select_last_index=1),
        case("TopK", X, axes(2), opsets=(10, 11, LATEST), outputs=2),
        case("TopK", X, axes(2), opsets=(11,), outputs=2, axis=1, largest=0),
        case("TopK", X, opsets=(OLDEST,), outputs=2, k=2),
    ]


def shapes() -> list[Case]:
    return [
        case("Shape", X),
        case("Shape", X, opsets=(15, LATEST), start=1, end=-1),
        case("Size", X),
        case("Reshape", X, axes(0, -1)),
        case("Reshape", X, axes(-1, 4), opsets=(14,), allowzero=1),
        *(case("Flatten", X, axis=axis) for axis in (0, 1, 2)),
        case("Transpose", X, perm=[0, 2, 1]),
        case("Transpose", X),
        case("Squeeze", noise(2, 1, 4, 1), opsets=(OLDEST, 11), axes=[1, 3]),
        case("Squeeze", noise(2, 1, 4, 1), axes(1, -1), opsets=(13, LATEST)),
        case("Unsqueeze", X, opsets=(OLDEST, 11), axes=[1, 4]),
        case("Unsqueeze", X, axes(1, -1), opsets=(13, LATEST)),
        case("Concat", X, noise(2, 3, 2), X, axis=2),
        case("Concat", X, const(noise(2, 3, 2)), axis=-1),
        case("Split", X, opsets=(OLDEST, 11), outputs=2, axis=2, split=[1, 3]),
        case("Split", X, axes(1, 3), opsets=(13, LATEST), outputs=2, axis=2),
        case("Split", X, opsets=(OLDEST, 13), outputs=2, axis=2),
        case("Split", X, opsets=(18, LATEST), outputs=2, axis=1, num_outputs=2),
        case("Slice", X, opsets=(OLDEST,), starts=[1, 0], ends=[3, 100], axes=[1, 2]),
        case("Slice", X, axes(1, 0), axes(3, 2**31), axes(1, 2), axes(1, 2), opsets=(10, 11, 13, LATEST)),
        case("Slice", X, axes(-1), axes(-(2**31)), axes(2), axes(-1), opsets=(10, LATEST)),
        case("Slice", X, axes(0, 1), axes(2, 2), opsets=(10,)),
        case("Gather", X, axes(1, -1), opsets=(OLDEST, 11, LATEST), axis=2),
        case("Gather", X, const(1, "int64"), opsets=(OLDEST, LATEST), axis=1),
        case("Gather", X, const([[0, 1], [2, 0]], "int64"), axis=1),
        case("Gather", TABLE_OF_IDS, IDS),
        case("Gather", const(noise(4, 5)), IDS, axis=1),
        case("GatherElements", X, (IDS % 4)[:, :, None].repeat(4, 2), opsets=(11, LATEST), axis=2),
        case("GatherND", X, const([[0, 1], [1, 2]], "int64"), opsets=(11, LATEST)),
        case("Scatter", X, IDS[:, :, None] % 3, noise(2, 3, 1), opsets=(OLDEST, 10), axis=1),
        case("ScatterElements", X, IDS[:, :, None] % 3, noise(2, 3, 1), opsets=(11, LATEST), axis=2),
        case("ScatterElements", X, IDS[:, :, None] % 3, noise(2, 3, 1), opsets=(16, 18), axis=2, reduction="add"),
        case("ScatterND", X, const([[0, 1], [1, 2]], "int64"), const(noise(2, 4)), opsets=(11, LATEST)),
        case("ScatterND", X, const([[0, 1], [0, 1]], "int64"), const(noise(2, 4)), opsets=(16,), reduction="add"),
        case("Expand", noise(2, 1, 4), axes(1, 3, 1)),
        case("Expand", noise(2, 1, 4), axes(3, 1)),
        case("Tile", X, axes(1, 2, 3)),
        case("OneHot", IDS, const(4, "int64"), const([0.0, 1.0])),
        case("OneHot", IDS - 2, const(4, "int64"), const([-1.0, 2.0]), opsets=(11, LATEST), axis=1),
        case("Pad", X, opsets=(OLDEST,), pads=[0, 1, 0, 0, 0, 2], value=1.5),
        case("Pad", X, axes(0, 1, 0, 0, 0, 2), const(1.5), opsets=(11, 13, LATEST)),
        case("Pad", X, axes(0, -1, 0, 0, 0, 2), opsets=(11,)),
        *(case("Pad", X, axes(0, 1, 2, 0, 0, 3), opsets=(11, 18), mode=mode) for mode in ("edge", "reflect")),
        case("Pad", X, axes(1, 2, 3, 0), None, axes(1, 2), opsets=(18, LATEST), mode="edge"),
        case("Pad", X, axes(0, 1, 2, 0, 0, 3), opsets=(19,), mode="wrap"),
        case("Trilu", X, opsets=(14, LATEST)),
        case("Trilu", X, const(1, "int64"), opsets=(14,), upper=0),
        case("EyeLike", noise(2, 4), k=1),
        case("DepthToSpace", noise(2, 8, 3, 4), blocksize=2),
        case("DepthToSpace", noise(2, 8, 3, 4), opsets=(11, LATEST), blocksize=2, mode="CRD"),
        case("SpaceToDepth", noise(2, 2, 4, 6), blocksize=2),
        case("Upsample", PICTURE, const([1, 1, 2, 3]), opsets=(OLDEST,)),
        case("Upsample", PICTURE, const([1, 1, 2, 3]), opsets=(OLDEST,), mode="linear"),
    ]


def resizes() -> list[Case]:
    roi = const(np.zeros(0))
    double, odd = const([1, 1, 2, 2]), const([1, 1, 1.5, 0.8])
    found = [
        case("Resize", PICTURE, double, opsets=(10,)),
        case("Resize", PICTURE, double, opsets=(10,), mode="linear"),
    ]
    for coordinates in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric"):
        opsets = (19, LATEST) if coordinates == "half_pixel_symmetric" else (11, 13, LATEST)
        how = {"coordinate_transformation_mode": coordinates}
        found += [
            case("Resize", PICTURE, roi, scales, opsets=opsets, mode=mode, **how)
            for scales in (double, odd)
            for mode in ("nearest", "linear", "cubic")
        ]
    for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"):
        how = {"nearest_mode": rounding, "coordinate_transformation_mode": "asymmetric"}
        found += [case("Resize", PICTURE, roi, odd, opsets=(11, LATEST), mode="nearest", **how)]
    return [
        *found,
        case("Resize", PICTURE, roi, double, opsets=(11,), mode="cubic", cubic_coeff_a=-0.5),
        case("Resize", PICTURE, roi, odd, opsets=(11,), mode="cubic", exclude_outside=1),
        case("Resize", PICTURE, None, None, axes(2, 4, 10, 9), opsets=(13, LATEST), mode="linear"),
        case("Resize", PICTURE, None, const([2.0, 3.0]), opsets=(18, LATEST), axes=[2, 3], mode="nearest"),
        case("Resize", SIGNAL, None, const([1.0, 1.0, 2.0]), opsets=(13,), mode="linear"),
    ]


def recurrent() -> list[Case]:
    steps = noise(2, 5, 3)  # the batch is second, or first with layout 1

    def weights(directions: int, gates: int, hidden: int = 4) -> tuple[Const, ...]:
        return (
            const(noise(directions, gates * hidden, 3, seed=1)),
            const(noise(directions, gates * hidden, hidden, seed=2)),
            const(noise(directions, 2 * gates * hidden, seed=3)),
        )

    found = []
    for op, gates, own in (("LSTM", 4, {}), ("GRU", 3, {"linear_before_reset": 1}), ("RNN", 1, {})):
        for direction, count in (("forward", 1), ("reverse", 1), ("bidirectional", 2)):
            how = {"hidden_size": 4, "direction": direction, "outputs": 3 if op == "LSTM" else 2, **own}
            found += [case(op, steps, *weights(count, gates), opsets=(OLDEST, 14, LATEST), **how)]
        found += [case(op, steps, *weights(1, gates)[:2], opsets=(14,), hidden_size=4, **own)]
        states = [noise(1, 5, 4, seed=7), noise(1, 5, 4, seed=8)][: 2 if op == "LSTM" else 1]
        given = (const(states[0]), *(const(state) for state in states[1:]))
        found += [case(op, steps, *weights(1, gates), None, *given, opsets=(14,), hidden_size=4, **own)]
    found += [
        case("RNN", steps, *weights(1, 1), opsets=(14,), hidden_size=4, activations=["Relu"]),
        case("LSTM", steps, *weights(1, 4), None, const(np.zeros((1, 5, 4))), opsets=(14,), hidden_size=4),
    ]
    return found


def attentions() -> list[Case]:
    heads = noise(2, 2, 5, 4), noise(2, 2, 5, 4, seed=1), noise(2, 2, 5, 4, seed=2)
    flat = noise(2, 5, 8), noise(2, 5, 4, seed=1), noise(2, 5, 4, seed=2)
    turns = const(np.cos(noise(7, 2))), const(np.sin(noise(7, 2)))
    places = np.array([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]])
    return [
        case("Attention", *heads, opsets=(23,)),
        case("Attention", *heads, opsets=(23,), is_causal=1, scale=0.3),
        case("Attention", *heads, const(noise(5, 5, seed=4)), opsets=(23,)),
        case("Attention", *flat, opsets=(23,), q_num_heads=4, kv_num_heads=2),
        case("RotaryEmbedding", heads[0], *turns, places, opsets=(23,)),
        case("RotaryEmbedding", heads[0], *turns, places, opsets=(23,), interleaved=1),
        case("RotaryEmbedding", flat[0], *turns, places, opsets=(23,), num_heads=2),
    ]


CASES = [
    (one, opset)
    for group in (
        *(unary, binary, linear, convolutions, normalizations, reductions),
        *(shapes, resizes, recurrent, attentions),
    )
    for one in group()
    for opset in one.opsets
]


def label(value: object) -> str:
    return f"{value.op}-{value.attributes}" if isinstance(value, Case) else str(value)


@pytest.mark.parametrize(("one", "opset"), CASES, ids=label)
def test_operator_equals_onnx_runtime(one: Case, opset: int) -> None:
    proto = one_node(one.op, opset, one.inputs, outputs=one.outputs, domain=one.domain, **one.attributes)
    feed = {f"x{i}": value for i, value in enumerate(one.inputs) if isinstance(value, np.ndarray)}
    for value in proto.graph.output:
        expected = run(proto, feed, value.name)
        module = import_graph(proto, value.name).module.eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            got = module(*(torch.from_numpy(array) for array in feed.values())).numpy()
        assert got.shape == expected.shape
        np.testing.assert_allclose(
            got.astype(np.float64), expected.astype(np.float64), atol=1e-4 * max(1, np.abs(expected).max(initial=0))
        )


def test_every_operator_of_the_table_is_tried() -> None:
    tried = {f"{one.domain}.{one.op}" if one.domain else one.op for one, _ in CASES}
    # Range and ConstantOfShape make tensors of sizes alone: they are tried in graphs, in test_onnx_graph.
    assert set(TABLE) - tried == {"Range", "ConstantOfShape"}


REFUSED = {
    "a kind without a form here": (case("NonZero", X), "NonZero.*has no trainable form"),
    "indices of maxima": (case("MaxPool", PICTURE, outputs=2, kernel_shape=[2, 2]), "places of its maxima"),
    "clipped gates": (
        case("LSTM", noise(2, 5, 3), const(noise(1, 16, 3)), const(noise(1, 16, 4)), hidden_size=4, clip=1.0),
        "clips its gates",
    ),
    "a GRU of Keras": (
        case("GRU", noise(2, 5, 3), const(noise(1, 12, 3)), const(noise(1, 12, 4)), hidden_size=4),
        "linear_before_reset",
    ),
    "a size out of the data": (case("Reshape", noise(2, 6), np.array([-1, 3])), "out of the data"),
    "a kernel of four dimensions": (case("MaxPool", noise(2, 1, 2, 2, 2, 2), kernel_shape=[1] * 4), "4 dimensions"),
    "antialiasing": (
        case("Resize", PICTURE, None, const([1, 1, 0.5, 0.5]), opsets=(18,), mode="linear", antialias=1),
        "antialiasing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_is_refused_with_its_name(name: str) -> None:
    one, words = REFUSED[name]
    proto = one_node(one.op, max(one.opsets[0], 14), one.inputs, outputs=one.outputs, **one.attributes)
    inputs = [torch.from_numpy(value) for value in one.inputs if isinstance(value, np.ndarray)]
    with pytest.raises((NotImportable, Unsupported), match=words):
        import_graph(proto, "y").module(*inputs)
