"""The one object that says how to train, wherever a technique trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.contract.distillation import Distill
from app.contract.strict import Strict

Optimizer = Literal["sgd", "adam", "adamw", "rmsprop"]
Schedule = Literal["constant", "step", "cosine", "one_cycle"]


class EarlyStopping(Strict):
    """Ends the training when the validation metric has not grown for `patience` epochs, and keeps the best weights."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    min_delta: Annotated[float, Field(ge=0, le=1)] = 0.0


class Training(Strict):
    """How to train. Give `epochs` or `steps`; without either, one epoch."""

    epochs: Annotated[int | None, Field(ge=1, le=10_000)] = None
    steps: Annotated[int | None, Field(ge=1, le=10_000_000)] = None
    optimizer: Optimizer = "adam"
    lr: Annotated[float, Field(gt=0, le=100, description="Peak learning rate.")] = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1, description="For sgd and rmsprop.")] = 0.9
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    schedule: Schedule = "constant"
    step_size: Annotated[int, Field(ge=1, le=10_000, description="Epochs between two cuts, for schedule step.")] = 10
    gamma: Annotated[float, Field(gt=0, le=1, description="Factor of a cut, for schedule step.")] = 0.1
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 64
    early_stopping: EarlyStopping | None = None
    distill: Distill | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 1)
        return self
