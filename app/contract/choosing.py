"""The step that a quantize step of method auto becomes, and why: by the model's task and layers, data and target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from app.contract.automatic import Automatic
from app.contract.errors import DatasetMismatch, InvalidSpec, Unsupported
from app.contract.facts import DatasetFacts, ModelFacts, calibration_split
from app.contract.spec import ExportFormat, Quantize, ResolvedSpec, Step
from app.contract.weight_only import WeightOnly

COMPRESSED_TENSORS = "compressed-tensors"
# What tells a transformer: its norms, and that so much of its weights is of layers that dynamic int8 covers.
NORMS, MOSTLY = ("LayerNorm", "RMSNorm"), 0.9
WITHOUT_SAMPLES = ("Linear", "NonDynamicallyQuantizableLinear", "MultiheadAttention", "Conv1D")


@dataclass(frozen=True)
class Choice:
    """A step that can be taken, and a sentence."""

    step: Quantize | WeightOnly
    why: str


def settled(spec: ResolvedSpec, model: ModelFacts, dataset: DatasetFacts | None) -> ResolvedSpec:
    """With every step of method auto replaced by its choice; raises what `choose` raises, with the step's pointer."""
    steps: list[Step] = []
    for index, step in enumerate(spec.steps):
        if isinstance(step, Automatic):
            if step.target == "vllm" and COMPRESSED_TENSORS not in spec.export:
                raise InvalidSpec(f"vLLM loads {COMPRESSED_TENSORS}: name it in export.", pointer="/export")
            steps.append(choose(step, model, dataset, spec.export, spec.pointer(index)).step)
        else:
            steps.append(step)
    return spec.model_copy(update={"steps": tuple(steps)})


def choose(
    step: Automatic, model: ModelFacts, dataset: DatasetFacts | None, export: Sequence[ExportFormat], pointer: str
) -> Choice:
    """The method for a model, and for the artifacts of `export`. Raises Unsupported where the target cannot run it,
    DatasetMismatch where only a method that needs samples would do and there are none."""
    if step.target == "vllm" and not (model.task == "causal-lm" and model.format == "huggingface"):
        raise Unsupported(
            f"vLLM runs causal language models that come as folders of transformers; this one is for {model.task} and "
            f"came as {model.format}. Name another target.",
            pointer=f"{pointer}/target",
        )
    samples = calibration_split(dataset) is not None
    if model.task == "causal-lm":
        return _of_language(step, samples)
    if samples:
        activations = "uint8" if step.target == "x86" else "int8"
        # Which of the two is better has to be measured; TensorRT reads static files alone, and pt2 has no form of
        # dynamic int8.
        either = step.target == "x86" and "pt2" not in export and _is_transformer(model)
        found = Quantize(method="static", activations=activations, or_dynamic=either, exclude=step.exclude)
        return Choice(found, _why_static(step, either))
    if any(layer.type in WITHOUT_SAMPLES for layer in model.layers):
        why = "There are no samples to find the ranges of activations with, so they are found as they come."
        return Choice(Quantize(method="dynamic", exclude=step.exclude), why)
    raise DatasetMismatch(
        "Of this model's layers only convolutions and the like could be quantized, and that needs samples to find the "
        "ranges of activations with: give a dataset with a `calibration`, `train` or `validation` split.",
        pointer="/dataset",
    )


def _of_language(step: Automatic, samples: bool) -> Choice:
    """Four bits: what is generated word by word waits for weights to be read."""
    packed = step.target in ("cuda", "vllm")  # whose kernels know no zero points everywhere
    found = WeightOnly(
        bits=4,
        symmetric=packed,
        algorithm="gptq" if samples else "rtn",
        embeddings=None if step.target == "vllm" else 8,
        exclude=step.exclude,
    )
    how = "with samples GPTQ loses least" if samples else "there are no samples, so weights go to the nearest"
    grid = "symmetric, as GPU kernels want it" if packed else "with zero points, which are more accurate"
    why = f"A language model waits for its weights to be read: 4 bits in groups of 128, {grid}; {how}."
    return Choice(found, why)


def _is_transformer(model: ModelFacts) -> bool:
    """The norms are named by their ends: T5LayerNorm, DebertaV2LayerNorm, LlamaRMSNorm."""
    covered = sum(layer.parameters for layer in model.layers if layer.type in (*WITHOUT_SAMPLES, "Embedding"))
    linear = any(layer.type in WITHOUT_SAMPLES for layer in model.layers)
    normed = any(layer.type.endswith(NORMS) for layer in model.layers)
    return linear and normed and covered >= MOSTLY * sum(layer.parameters for layer in model.layers)


def _why_static(step: Automatic, either: bool) -> str:
    types = {
        "x86": "uint8 activations, as the instructions of x86 multiply them by int8 weights",
        "arm": "int8 activations, as the instructions of ARM have it",
        "cuda": "int8 activations, as TensorRT reads it",
    }
    found = f"There are samples to find the ranges of activations with: static int8, {types[step.target]}."
    also = " Dynamic int8 is tried besides; the details of the artifact say which one it is."
    return found + (also if either else "")
