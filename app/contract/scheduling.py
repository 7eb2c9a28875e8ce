"""How the learning rate changes along a training. Part of `Training`."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.contract.strict import Strict

Schedule = Literal[
    "constant",
    "step",
    "multi_step",
    "exponential",
    "cosine",
    "cosine_restarts",
    "one_cycle",
    "linear",
    "polynomial",
    "plateau",
]
Epochs = Annotated[int, Field(ge=1, le=10_000)]

# An exponential falls every epoch; a tenth each time, as of a step, would end most trainings after three.
USUAL_GAMMA: dict[str, float] = {"exponential": 0.95}
# Which schedules read a field; the others are refused with it, since the client expects something of it.
READ_BY: dict[str, tuple[str, ...]] = {
    "step_size": ("step",),
    "milestones": ("multi_step",),
    "gamma": ("step", "multi_step", "exponential", "plateau"),
    "restart_every": ("cosine_restarts",),
    "restart_factor": ("cosine_restarts",),
    "power": ("polynomial",),
    "end_factor": ("cosine", "cosine_restarts", "linear", "polynomial", "plateau"),
    "plateau_patience": ("plateau",),
}


class Scheduling(Strict):
    """The fields of a training that say how its rate changes."""

    schedule: Schedule = "constant"
    warmup_steps: Annotated[
        int, Field(ge=0, le=10_000_000, description="First steps, over which the rate grows to its peak.")
    ] = 0
    warmup_share: Annotated[float, Field(ge=0, lt=1, description="The same as a share of all steps.")] = 0.0
    step_size: Annotated[Epochs, Field(description="Epochs between two cuts, for step.")] = 10
    milestones: Annotated[tuple[Epochs, ...], Field(max_length=64, description="Epochs of cuts, for multi_step.")] = ()
    gamma: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Factor of a cut, for step, multi_step and plateau; of an epoch, for exponential (0.95 there).",
        ),
    ] = 0.1
    restart_every: Annotated[Epochs, Field(description="Epochs of the first cycle, for cosine_restarts.")] = 10
    restart_factor: Annotated[
        int, Field(ge=1, le=10, description="How many times longer each next cycle is, for cosine_restarts.")
    ] = 1
    power: Annotated[float, Field(gt=0, le=10, description="For polynomial; 1 is linear.")] = 2.0
    end_factor: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Share of lr where cosine, cosine_restarts, linear and polynomial end, and plateau stops.",
        ),
    ] = 0.0
    plateau_patience: Annotated[
        int, Field(ge=0, le=1000, description="Epochs without a better validation metric before plateau cuts.")
    ] = 2

    @model_validator(mode="before")
    @classmethod
    def _usual_gamma(cls, data: Any) -> Any:
        if isinstance(data, dict) and "gamma" not in data and str(data.get("schedule")) in USUAL_GAMMA:
            return {**data, "gamma": USUAL_GAMMA[data["schedule"]]}
        return data

    @model_validator(mode="after")
    def _schedule_reads_them(self) -> Scheduling:
        fields = type(self).model_fields
        for name, readers in READ_BY.items():
            if getattr(self, name) != fields[name].default and self.schedule not in readers:
                raise ValueError(f"{name} is for schedule {' or '.join(readers)}; it is {self.schedule}")
        if (self.schedule == "multi_step") != bool(self.milestones):
            raise ValueError("schedule multi_step needs milestones: the epochs after which the rate is cut")
        if any(later <= earlier for earlier, later in pairwise(self.milestones)):
            raise ValueError(f"milestones must grow; they are {', '.join(map(str, self.milestones))}")
        return self

    @model_validator(mode="after")
    def _one_warmup(self) -> Scheduling:
        if self.warmup_steps and self.warmup_share:
            raise ValueError("give warmup_steps or warmup_share, not both")
        if self.schedule == "one_cycle" and (self.warmup_steps or self.warmup_share):
            raise ValueError("schedule one_cycle has a warm-up of its own: leave warmup_steps and warmup_share out")
        return self
