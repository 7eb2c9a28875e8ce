"""Weights on grids: which neighbours share a step, and whether a zero point moves the grid."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from app.contract.strict import Strict

LEAST_GROUP, MOST_GROUP = 16, 256


class Grouped(Strict):
    """The fields of steps that put weights on grids of groups."""

    group_size: Annotated[
        int | None,
        Field(
            ge=LEAST_GROUP,
            le=MOST_GROUP,
            description="Inputs that share a step, a power of two. Where it does not divide a layer's inputs, the "
            f"largest that does is taken, or, below {LEAST_GROUP} and in convolutions, one step an output. null: one "
            "step an output everywhere.",
        ),
    ] = 128
    symmetric: bool = Field(False, description="Whether zero is the middle of the grid; else a zero point moves it.")

    @model_validator(mode="after")
    def _power(self) -> Grouped:
        if self.group_size is not None and self.group_size & (self.group_size - 1):
            raise ValueError(f"group_size is a power of two; it is {self.group_size}")
        return self
