"""A float ONNX file to an int8 one, through ONNX Runtime's quantizer.

Static files are QDQ: weights stored as int8 (symmetric, zero point 0, so that a pruned zero stays an exact zero) with
one scale an output channel, activations uint8 on x86. Dynamic files quantize matrix products with constant weights and
embeddings only: a dynamically quantized convolution is slower than a floating-point one.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Literal

import onnx
from onnx import version_converter
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process

from app.contract.errors import ExportFailed, TersorError
from app.contract.spec import Quantize
from worker.export.quiet import quiet
from worker.export.strip import strip
from worker.techniques.base import Details
from worker.techniques.quantization.calibration import Samples
from worker.techniques.quantization.graph import uses
from worker.techniques.quantization.int8_graph import Int8Graph
from worker.techniques.quantization.leaving import Limit, Make, candidates, leave
from worker.techniques.quantization.normal_form import normalize
from worker.techniques.quantization.static.learned import NOTHING_LEARNED, Learned
from worker.techniques.quantization.static.quantizer import Plan, quantize_static
from worker.techniques.quantization.stored import check_stored, weight_inputs
from worker.vetting.boundary import ran_out_of_memory

# Operators with weights, then those through which 8-bit values pass so that a convolutional network stays in integers
# from end to end. Softmax, normalizations and activation functions other than Relu stay floating point: their ranges
# are wide, and 8 bits there cost accuracy for little time.
STATIC_OPS = [
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "Add", "Mul", "Relu", "Clip"),
    *(
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "Reshape",
        "Flatten",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Concat",
    ),
]
# In a transformer the sums between the blocks carry outliers that one scale a tensor cannot hold.
TRANSFORMER_OPS = ["Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"]
DYNAMIC_OPS = ("MatMul", "Gemm", "Gather")
# What tells a transformer: its norms, as one operator or, in older files, written out with a root.
NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SkipLayerNormalization", "Sqrt"})
# The first whose DequantizeLinear has an axis. An uploaded graph may be older; what the exporter writes is not.
QDQ_OPSET = 13
# What the quantizer calls a Gemm after it has split it into MatMul and Add.
SPLIT_GEMM = "_MatMul"


def activation_type(wanted: Literal["auto", "uint8", "int8"]) -> Literal["uint8", "int8"]:
    """The integer type of activations: `auto` is uint8 on x86, whose int8 instructions multiply unsigned by signed."""
    if wanted != "auto":
        return wanted
    return "uint8" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "int8"


def reduced_range(step: Quantize) -> bool:
    """Whether weights use -64..64 of their 8 bits, as they must where activations are uint8.

    x86 processors without VNNI add two uint8 x int8 products in 16 bits and clip the sum: with weights up to 127 whole
    output channels come out wrong there, with weights up to 64 no sum can overflow (2 * 255 * 64 < 2^15). Dynamic
    quantization always has uint8 activations.
    """
    return step.method == "dynamic" or activation_type(step.activations) == "uint8"


def quantize_file(
    source: Path,
    target: Path,
    step: Quantize,
    samples: Samples | None,
    float_layers: Collection[str],
    limit: Limit | None = None,
    learned: Learned = NOTHING_LEARNED,
) -> Int8Graph:
    """Writes the int8 form of the float ONNX file `source` to `target`, and beside `source` what it stands for.

    `float_layers` are the layers (names of the torch module) that stay floating point; others stay so too where the
    `limit` would not be held. `samples` are for method static, and so is what a training has `learned`.
    Raises ExportFailed where the runtime's quantizer fails, or where a weight that was to become int8 did not, or is in
    the file twice.
    """
    details: Details = {}
    floats = source
    with tempfile.TemporaryDirectory(dir=source.parent, prefix="int8-") as folder, quiet():
        prepared = prepare(source, Path(folder) / "prepared.onnx")
        proto = onnx.load(prepared)
        kept = [node.name for node, weight in weight_inputs(proto.graph) if layer_of(weight) in float_layers]
        promised = DYNAMIC_OPS if step.method == "dynamic" else tuple(TRANSFORMER_OPS)
        if step.method == "dynamic":
            kept += tied_embeddings(proto.graph)
        try:
            if step.method == "static":
                assert samples is not None  # compatibility.check asked for calibration data
                floats = source.with_name(f"{source.stem}-rounded{source.suffix}")
                make, details = _static(proto, prepared, floats, step, samples, kept, learned)
            else:
                make = partial(_dynamic, prepared, step, kept)
            if limit is None:
                make((), target)
            else:
                layers = candidates(proto.graph, promised, kept, products=step.method == "static")
                left, told = leave(layers, make, limit, prepared, target)
                kept, details = [*kept, *left], details | told
        except TersorError:
            raise
        except Exception as error:
            if ran_out_of_memory(error):
                raise
            raise ExportFailed(f"ONNX Runtime could not quantize the model: {error}") from error
    quantized = onnx.load(target)
    strip(quantized)
    onnx.save_model(quantized, str(target))
    if details.get("layers_int8") != 0:  # else the limit let none become integers
        check_stored(proto, quantized, promised, kept)
    return Int8Graph(target, source, floats, details)


def prepare(source: Path, target: Path) -> Path:
    """An opset that knows scales a channel, the form that the quantizer takes, and shape inference, so that it knows
    every tensor.

    ONNX's own is enough for what the exporter writes (`check_stored` would tell); ONNX Runtime's symbolic one gives up
    on transformers and then leaves files in the working folder. Graph optimization is left out as well: the exporter
    has folded constants and batch norms, and the runtime's pass would rename weights that the report traces to layers.
    """
    proto = onnx.load(source)
    if next(entry.version for entry in proto.opset_import if entry.domain == "") < QDQ_OPSET:
        try:
            proto = version_converter.convert_version(proto, QDQ_OPSET)
        except Exception as error:  # the library's C++ errors share no class
            raise ExportFailed(
                f"The uploaded graph's opset is too old for scales a channel, and onnx cannot convert it: {error}"
            ) from error
    normalize(proto)
    normal = target.with_name("normal.onnx")
    onnx.save_model(proto, str(normal))
    quant_pre_process(normal, target, skip_optimization=True, skip_symbolic_shape=True)
    return target


def layer_of(weight: str) -> str:
    """The name that the model's facts list a weight under: `emb.weight` -> `emb`, `0.in_proj_weight` as it is."""
    return weight.removesuffix(".weight")


def _static(
    proto: onnx.ModelProto,
    prepared: Path,
    floats: Path,
    step: Quantize,
    samples: Samples,
    kept: list[str],
    learned: Learned,
) -> tuple[Make, Details]:
    """Finds everything on the float graph, which is then as it is whatever else stays floating point."""
    ops = _static_ops(proto)
    plan = Plan(
        kept=[*kept, *among_floats(proto.graph, ops, kept)],
        ops=ops,
        activations=activation_type(step.activations),
        reduced=reduced_range(step),
        float_outputs=ops is TRANSFORMER_OPS,
    )
    found = quantize_static(prepared, floats, step, samples, plan, learned)

    def make(left: Collection[str], target: Path) -> None:
        graph = found.proto.graph
        own = [*left, *among_floats(graph, ops, [*kept, *left])] if left else []
        onnx.save_model(found.made(own), str(target))

    return make, found.details


def _static_ops(proto: onnx.ModelProto) -> list[str]:
    is_transformer = any(node.op_type in NORMS for node in proto.graph.node)
    return TRANSFORMER_OPS if is_transformer else STATIC_OPS


def tied_embeddings(graph: onnx.GraphProto) -> list[str]:
    """The Gather nodes whose weight is another operator's too, such as the output layer of a language model.

    The dynamic quantizer would leave that one the floats and store the integers beside them.
    """
    users = uses(graph)
    return [node.name for node, weight in weight_inputs(graph) if node.op_type == "Gather" and users[weight] > 1]


def among_floats(graph: onnx.GraphProto, ops: Collection[str], kept: Collection[str]) -> list[str]:
    """The sums, products and poolings none of whose inputs comes out of an operator that is quantized.

    Among floating-point operators 8 bits save no time there, and the values can span more than 8 bits hold: the
    energies of a spectrogram do.
    """
    integers: set[str] = set()
    found = []
    for node in graph.node:  # in the order of computation
        if node.op_type not in ops or node.name in kept:
            continue
        if node.op_type in TRANSFORMER_OPS or not integers.isdisjoint(node.input):
            integers.update(node.output)
        else:
            found.append(node.name)
    return found


def _dynamic(source: Path, step: Quantize, kept: list[str], left: Collection[str], target: Path) -> None:
    kept = [*kept, *left]
    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=list(DYNAMIC_OPS),
        per_channel=step.per_channel,
        weight_type=QuantType.QInt8,
        reduce_range=reduced_range(step),
        nodes_to_exclude=[*kept, *(name + SPLIT_GEMM for name in kept)],
        extra_options={"WeightSymmetric": True, "MatMulConstBOnly": True},
    )
