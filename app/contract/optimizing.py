"""How weights are moved: the optimizer and what belongs to it. Part of `Training`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.contract.strict import Strict

Optimizer = Literal["sgd", "adam", "adamw", "rmsprop", "adagrad", "adadelta", "nadam", "radam", "adafactor"]
Auto = Literal["auto"]
"""To be found by short trainings, before the real one."""
Precision = Literal["float32", "bf16", "fp16", "auto"]
Rate = Annotated[float, Field(gt=0, le=100)]
Beta = Annotated[float, Field(ge=0, lt=1)]

# Rates that these optimizers are known to work with; the others take 0.001. Adadelta and Adafactor scale their steps.
USUAL_LR: dict[str, float] = {"adadelta": 1.0, "adafactor": 0.01}
WITH_MOMENTUM = ("sgd", "rmsprop")
WITH_BETAS = ("adam", "adamw", "nadam", "radam")


class Ema(Strict):
    """Delivers a running mean of the weights over the steps: w_mean <- decay * w_mean + (1 - decay) * w.

    The decay begins lower, at (1 + n) / (10 + n) after n steps, so that short trainings forget where they began.
    Validation judges the mean.
    """

    kind: Literal["ema"] = "ema"
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999


class Swa(Strict):
    """Delivers the plain mean of the weights along the end of the training (Izmailov et al. 2018).

    The statistics of BatchNorm are measured anew for the mean, by one more pass over the training data.
    """

    kind: Literal["swa"] = "swa"
    start: Annotated[float, Field(ge=0, lt=1, description="Share of the steps after which averaging begins.")] = 0.75
    every: Annotated[
        int | None, Field(ge=1, le=10_000_000, description="Steps between two points of the mean; null: an epoch.")
    ] = None


Averaging = Annotated[Ema | Swa, Field(discriminator="kind")]


class Optimizing(Strict):
    """The fields of a training that say how weights are moved."""

    optimizer: Optimizer | Auto = Field("adam", description="auto: raced against each other.")
    lr: Rate | Auto = Field(
        1e-3, description="Peak learning rate; auto: found. Unless given: 1.0 for adadelta, 0.01 for adafactor."
    )
    momentum: Annotated[float, Field(ge=0, lt=1, description="For sgd and rmsprop.")] = 0.9
    nesterov: bool = Field(False, description="Nesterov's momentum, for sgd.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="For adam, adamw, nadam and radam.")
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    decay_norms: bool = Field(
        False, description="Whether weight_decay reaches norms, biases and other weights of one dimension too."
    )
    layer_decay: Annotated[
        float,
        Field(gt=0, le=1, description="Each layer's rate is this times that of the layer above it (ELECTRA, BEiT)."),
    ] = 1.0
    clip_norm: Annotated[
        float | None, Field(gt=0, le=1e6, description="Largest norm of all gradients together; larger are scaled down.")
    ] = None
    precision: Precision = Field(
        "float32", description="Of forward and backward passes. auto: bf16 where the device computes in it."
    )
    averaging: Averaging | None = None
    divergence_retries: Annotated[
        int,
        Field(ge=0, le=10, description="How often a diverged training goes back and on with a quarter of the rate."),
    ] = 4

    @model_validator(mode="before")
    @classmethod
    def _usual_lr(cls, data: Any) -> Any:
        if isinstance(data, dict) and "lr" not in data and str(data.get("optimizer")) in USUAL_LR:
            return {**data, "lr": USUAL_LR[data["optimizer"]]}
        return data

    @model_validator(mode="after")
    def _optimizer_has_them(self) -> Optimizing:
        fields = type(self).model_fields
        for name, users in (("momentum", WITH_MOMENTUM), ("betas", WITH_BETAS), ("nesterov", ("sgd",))):
            if getattr(self, name) != fields[name].default and self.optimizer not in users:
                raise ValueError(f"{name} is for {' and '.join(users)}; the optimizer is {self.optimizer}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self
