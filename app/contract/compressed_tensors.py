"""What a folder of compressed-tensors can hold: codes of few bits, of which its readers know some kinds."""

from __future__ import annotations

from typing import TypeGuard

from app.contract.cast import Cast
from app.contract.choosing import COMPRESSED_TENSORS
from app.contract.errors import InvalidSpec, Unsupported
from app.contract.facts import ModelFacts
from app.contract.mixed import Mixed
from app.contract.qat import Qat
from app.contract.spec import ResolvedSpec, Step
from app.contract.weight_only import WeightOnly


def check_compressed_tensors(spec: ResolvedSpec, model: ModelFacts | None) -> None:
    """A folder of transformers with codes of few bits, of which its readers know some kinds."""
    if model is not None and model.format != "huggingface":
        raise Unsupported(
            f"{COMPRESSED_TENSORS} is a folder of transformers, and the model came as {model.format}: export onnx or "
            "packed instead.",
            pointer="/export",
        )
    found = [(index, step) for index, step in enumerate(spec.steps) if _of_few_bits(step)]
    if not found:
        raise InvalidSpec(
            f"{COMPRESSED_TENSORS} holds weights of few bits: add a step quantize with method weight_only or mixed, "
            "qat with 4 or 2 bits, or cast to float8_e4m3.",
            pointer="/export",
        )
    index, step = found[-1]
    if isinstance(step, Cast):
        return _check_float8(step, spec.pointer(index))
    if not step.symmetric:
        raise InvalidSpec(
            f"{COMPRESSED_TENSORS} needs symmetric: true, since transformers cannot load zero points (with "
            "compressed-tensors 0.18 to 0.20). Or export onnx or packed.",
            pointer=f"{spec.pointer(index)}/symmetric",
        )
    if 3 in (step.bits if isinstance(step, Mixed) else (step.bits,)):
        raise InvalidSpec(
            f"{COMPRESSED_TENSORS} stores 8, 4 or 2 bits: its versions disagree in how 3 are packed.",
            pointer=f"{spec.pointer(index)}/bits",
        )


def _of_few_bits(step: Step) -> TypeGuard[WeightOnly | Mixed | Qat | Cast]:
    return isinstance(step, WeightOnly | Mixed | Cast) or (isinstance(step, Qat) and not step.in_file)


def _check_float8(step: Cast, pointer: str) -> None:
    if step.dtype != "float8_e4m3":
        raise InvalidSpec(
            f"{COMPRESSED_TENSORS} stores 8 bits and fewer; {step.dtype} needs no format of its own. Export native: "
            "transformers loads it as it is.",
            pointer=f"{pointer}/dtype",
        )
