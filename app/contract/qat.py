"""The quantize step with method qat: the network trains as it will be when its numbers are whole."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.contract.calibration import Calibration
from app.contract.distillation import Distill
from app.contract.grouping import Grouped
from app.contract.pruning import Pattern
from app.contract.training import Training


class Qat(Grouped):
    """Quantization-aware training: the forward pass rounds, the backward pass takes the rounding for none."""

    technique: Literal["quantize"] = "quantize"
    method: Literal["qat"] = "qat"
    bits: Literal[8, 4, 3, 2] = Field(
        8,
        description="8: weights, a step an output, and what comes into their layers; delivered as ONNX or as a "
        "program of torch. Fewer: weights alone, in groups.",
    )
    steps: Literal["learned", "fixed"] = Field(
        "learned",
        description="learned: the steps of the grids train with the weights (LSQ, Esser et al. 2020). fixed: they stay "
        "as they were found before (Jacob et al. 2018).",
    )
    activations: Literal["auto", "uint8", "int8"] = Field(
        "auto", description="For 8 bits. auto: uint8 on x86, int8 elsewhere."
    )
    calibration: Calibration = Field(
        Calibration(method="mse"), description="For 8 bits: how the ranges are found that the training begins with."
    )
    exclude: Annotated[tuple[Pattern, ...], Field(max_length=256)] = ()
    training: Training = Field(
        Training(epochs=3, lr=1e-4, schedule="cosine", distill=Distill()),
        description="By default with distillation from the uploaded model, for which labels are not needed.",
    )

    @property
    def in_file(self) -> bool:
        """Whether activations are integers too, which live in the file alone."""
        return self.bits == 8

    @model_validator(mode="after")
    def _whole_weights(self) -> Qat:
        if self.training.sharded:
            raise ValueError("qat rounds whole weights, and sharded has shares of them: leave sharded out")
        if self.calibration.method == "auto":
            raise ValueError("calibration.method auto compares finished files; for qat name minmax, percentile or mse")
        return self
