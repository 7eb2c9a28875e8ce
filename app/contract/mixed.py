"""The quantize step with method mixed: each layer gets the bits that its measured sensitivity asks for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.contract.weight_only import FewBits

# Weights that go by while layers are measured: parameters x layers x widths x samples. It is one sample of a language
# model of 135 million parameters, and all that are asked for of a network of a few million.
MOST_MEASURED = 2 * 10**11
MOST_TRIED = 12  # roundings of the whole that a search for the fewest bytes tries


class Mixed(FewBits):
    """As weight_only, with bits a layer: those with which the outputs change least within a limit of bytes or of time,
    or the fewest bytes that hold the metric on the validation split.

    How much a layer minds is measured: how far the outputs for calibration samples move where it alone is rounded.
    """

    method: Literal["mixed"] = "mixed"
    bits: Annotated[
        tuple[Literal[8, 4, 3, 2], ...], Field(min_length=1, max_length=4, description="Those that a layer may get.")
    ] = (8, 4, 3, 2)
    floats: bool = Field(True, description="Whether a layer may stay a float, as the upload stores it, too.")
    max_size: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="Bytes of the weights that the step is for, as a share of those that they take as floats. "
            "Counted are codes, steps (of the dtype that the upload stores) and zero points (of as many bits as a "
            "code, with hqq of 32).",
        ),
    ] = None
    max_latency: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="Time that products with the step's weights take for one sample, as a share of what they take "
            "with floats: measured in ONNX Runtime on the worker, product by product. For `onnx`, whose runtime it is.",
        ),
    ] = None
    max_accuracy_drop: Annotated[
        float | None,
        Field(
            ge=0,
            le=1_000_000,
            description="By how much the task's metric on validation may be worse than the upload's: the fewest bytes "
            "that hold it are taken.",
        ),
    ] = None

    def measured_on(self, parameters: int, layers: int) -> int:
        """Samples with which `layers` of a model of so many parameters are measured."""
        cost = max(1, parameters * layers * len(self.bits))
        return max(1, min(self.samples, MOST_MEASURED // cost))

    @model_validator(mode="after")
    def _limited(self) -> Mixed:
        limits = (self.max_size, self.max_latency, self.max_accuracy_drop)
        if sum(limit is not None for limit in limits) != 1:
            raise ValueError("give exactly one of max_size, max_latency and max_accuracy_drop")
        if len(set(self.bits)) != len(self.bits):
            raise ValueError("bits names a number twice")
        return self
