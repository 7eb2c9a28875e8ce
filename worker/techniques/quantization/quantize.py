"""The quantize step: checks that int8 can be had and leaves the wish to the exporter, since int8 lives in the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch

from app.contract.automatic import Automatic
from app.contract.cast import Cast
from app.contract.codebook import Codebook
from app.contract.facts import LayerFacts, calibration_split
from app.contract.mixed import Mixed
from app.contract.qat import Qat
from app.contract.spec import Quantize
from app.contract.weight_only import WeightOnly
from worker.context import Context
from worker.model import Model
from worker.techniques.base import Details
from worker.techniques.quantization import cast, codebook, mixed, weight_only
from worker.techniques.quantization.onnx_int8 import activation_type, reduced_range
from worker.techniques.quantization.qat import aware
from worker.techniques.quantization.stored import MIN_WEIGHT_DIMENSIONS

# Attention's packed projection is a matrix product like that of a Linear layer. The subclass is its output projection.
# Conv1D is what GPT-2 calls its linear layers.
DYNAMIC_TYPES = ("Linear", "NonDynamicallyQuantizableLinear", "MultiheadAttention", "Conv1D", "Embedding")
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
# Recurrent layers stay floating point: ONNX Runtime has no static int8 LSTM or GRU.
STATIC_TYPES = (*DYNAMIC_TYPES, *CONVOLUTIONS)


OwnStep = WeightOnly | Mixed | Codebook | Qat | Cast


@dataclass(frozen=True)
class _Own:
    """A method that is a step of its own, and a module of its own."""

    applies: Callable[[Any, Model], str | None]
    apply: Callable[[Any, Context], Details]


OWN_STEPS: dict[type[OwnStep], _Own] = {
    WeightOnly: _Own(weight_only.applies, weight_only.quantize_weights),
    Mixed: _Own(mixed.applies, mixed.quantize_mixed),
    Codebook: _Own(codebook.applies, codebook.share_values),
    Qat: _Own(aware.applies, aware.train_quantized),
    Cast: _Own(cast.applies, cast.cast_weights),
}


class QuantizeTechnique:
    """Quantization to int8, delivered as ONNX, after training (static, dynamic) or with it; or weights of few bits, of
    narrower floats or of a codebook, which are of the weights themselves and live in every artifact."""

    name: ClassVar[str] = "quantize"

    def applies(self, step: Quantize | OwnStep | Automatic, model: Model) -> str | None:
        """None, or why no weight of the model would be quantized."""
        if isinstance(step, Automatic):  # until it is known what there is to choose with
            return self.applies(Quantize(method="static", exclude=step.exclude), model)
        if not isinstance(step, Quantize):
            return OWN_STEPS[type(step)].applies(step, model)
        if not model.facts.trainable and torch.float16 in model.stored.values():
            return (
                "The graph runs as it is and computes in float16; int8 is made of float32. Export the model in float32."
            )
        layers = model.facts.layers
        eligible = eligible_layers(step, layers)
        if not eligible and step.method == "dynamic":
            return (
                "Dynamic quantization covers Linear and Embedding layers and the model has none: convolutions are "
                "never quantized dynamically, since that makes them slower. Use method static with calibration data."
            )
        if not eligible:
            return "The model has no Linear, convolution or Embedding layer to quantize."
        if all(excluded(layer.name, step) for layer in eligible):
            return "exclude leaves no layer to quantize."
        return None

    def apply(self, step: Quantize | OwnStep, context: Context) -> Details:
        """Moves weights to grids, with or without a training, casts them, shares values, or notes the step for the
        exporter. Details: how it is done, layer by layer or in numbers."""
        if not isinstance(step, Quantize):
            return OWN_STEPS[type(step)].apply(step, context)
        context.quantization = step
        layers = context.model.facts.layers
        chosen = [layer for layer in eligible_layers(step, layers) if not excluded(layer.name, step)]
        details: Details = {
            "method": step.method,
            "dtype": step.dtype,
            "per_channel": step.per_channel,
            "activations": activation_type(step.activations),
            "weights_within_7_bits": reduced_range(step),
        }
        if step.max_accuracy_drop is None:  # else the artifact says which they are
            details["layers_int8"] = len(chosen)
            matrices = sum(len(layer.shape) >= MIN_WEIGHT_DIMENSIONS for layer in layers)
            details["layers_float"] = matrices - len(chosen)
        if step.method == "static" and context.feed is not None:
            split = calibration_split(context.feed.data.facts)
            assert split is not None  # compatibility.check asked for one
            details["calibration_method"] = step.calibration.method
            details["rounding"] = step.rounding
            details["calibration_split"] = split
            details["calibration_samples"] = min(step.calibration.samples, context.feed.size(split))
        return details


def eligible_layers(step: Quantize, layers: tuple[LayerFacts, ...]) -> list[LayerFacts]:
    """The layers whose type the method covers."""
    types = DYNAMIC_TYPES if step.method == "dynamic" else STATIC_TYPES
    return [layer for layer in layers if layer.type in types]


def excluded(layer: str, step: Quantize) -> bool:
    """Whether one of the step's patterns names the layer, its weight, or the layer that a packed weight belongs to.

    The facts list `0` for `0.weight`, but a packed weight by its own name: `1.self_attn.in_proj_weight`.
    """
    parent, _, own = layer.rpartition(".")
    ways = (layer, parent) if "weight" in own else (layer, f"{layer}.weight")
    return any(fnmatchcase(way, pattern) for way in ways for pattern in step.exclude)
