"""The quantize step with method qat: the network trains as it will be when its numbers are whole."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.contract.calibration import Calibration
from app.contract.grouping import Grouped
from app.contract.optimizing import USUAL_LR
from app.contract.pruning import Pattern
from app.contract.training import Training

# What a client leaves out of `training`: steps learn slowly, and the uploaded model is the best teacher there is.
USUAL_TRAINING: dict[str, Any] = {"epochs": 3, "lr": 1e-4, "schedule": "cosine", "distill": {}}


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
        Training.model_validate(USUAL_TRAINING),
        description="What is left out is as it is by default; so a training is distilled from the uploaded model, for "
        "which labels are not needed, unless distill is null.",
    )

    @property
    def in_file(self) -> bool:
        """Whether activations are integers too, which live in the file alone."""
        return self.bits == 8

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, data: Any) -> Any:
        """Of what a client gives a part of, the rest is as it is by default here, and not as elsewhere."""
        if not isinstance(data, dict):
            return data
        found = dict(data)
        if isinstance(training := data.get("training"), dict):
            found["training"] = {**_usual(training), **training}
        if isinstance(calibration := data.get("calibration"), dict):
            found["calibration"] = {"method": "mse", **calibration}
        return found

    @model_validator(mode="after")
    def _whole_weights(self) -> Qat:
        if self.training.sharded:
            raise ValueError("qat rounds whole weights, and sharded has shares of them: leave sharded out")
        if self.calibration.method == "auto":
            raise ValueError(
                "calibration.method auto compares finished files; for qat name minmax, percentile, entropy or mse"
            )
        return self

    @model_validator(mode="after")
    def _bits_read_them(self) -> Qat:
        """Refuses what would be left unread: a client expects something of it."""
        fields = type(self).model_fields
        if self.in_file and self.group_size not in (None, fields["group_size"].default):
            raise ValueError("group_size is for fewer than 8 bits: with 8 each output has a step of its own")
        for name in () if self.in_file else ("activations", "calibration"):
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} is for 8 bits: with {self.bits} activations stay floating point")
        return self


def _usual(training: dict[str, Any]) -> dict[str, Any]:
    """The defaults that go with what is given: a training has one length, and some optimizers a rate of their own."""
    unfit = {"epochs"} if training.get("steps") is not None else set()
    unfit |= {"lr"} if str(training.get("optimizer")) in USUAL_LR else set()
    return {name: value for name, value in USUAL_TRAINING.items() if name not in unfit}
