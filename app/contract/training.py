"""The one object that says how to train, wherever a technique trains."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from app.contract.distillation import Distill
from app.contract.optimizing import Optimizing
from app.contract.scheduling import Scheduling
from app.contract.strict import Strict


class EarlyStopping(Strict):
    """Ends the training when the validation metric has not grown for `patience` epochs, and keeps the best weights."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    min_delta: Annotated[float, Field(ge=0, le=1)] = 0.0


class Training(Optimizing, Scheduling):
    """How to train. Give `epochs` or `steps`; without either, one epoch."""

    epochs: Annotated[int | None, Field(ge=1, le=10_000)] = None
    steps: Annotated[int | None, Field(ge=1, le=10_000_000)] = None
    batch_size: Annotated[int, Field(ge=1, le=65_536, description="Samples of one step.")] = 64
    micro_batch_size: Annotated[
        int | None,
        Field(ge=1, le=65_536, description="Samples in memory at once: a step adds up the gradients of such parts."),
    ] = None
    early_stopping: EarlyStopping | None = None
    checkpoint_steps: Annotated[
        int, Field(ge=1, le=1_000_000, description="Steps between the points that a training can go on from.")
    ] = 200
    distill: Distill | None = None

    @property
    def judges(self) -> bool:
        """Whether every epoch is judged on the validation split."""
        return self.early_stopping is not None or self.schedule == "plateau"

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 1)
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps must be fewer than the {self.steps} steps; they are {self.warmup_steps}")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(f"micro_batch_size is a part of batch_size, which is {self.batch_size}")
        if self.early_stopping is not None and self.averaging is not None and self.averaging.kind == "swa":
            raise ValueError("averaging swa needs the end of the training, which early_stopping cuts off: give one")
        return self
