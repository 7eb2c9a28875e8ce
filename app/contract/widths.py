"""The resize step with method width: every layer keeps a share of its units, and their weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.contract.budgets import TimedBudget
from app.contract.pruning import Pattern
from app.contract.structured import BY_INPUTS, KeepAtLeast, LookedAt, Recovers, RoundTo, StructuredPrune, Worth


class ResizeWidth(Recovers):
    """Makes the network narrower by width multipliers: each kind of layer keeps a share of its units, those of the
    highest worth, with the weights that they have."""

    technique: Literal["resize"] = "resize"
    method: Literal["width"] = "width"
    multiplier: Annotated[
        float | None, Field(gt=0, lt=1, description="The share of its units that every group keeps.")
    ] = None
    budget: TimedBudget | None = Field(None, description="Instead: how much of the model may be left.")
    search: Literal["uniform", "evolutionary"] = Field(
        "uniform",
        description="How a budget is met. uniform: by the largest multiplier that is one for all. evolutionary: by one "
        "for each kind of layer, those whose outputs on samples are nearest to the whole network's, found by an "
        "evolutionary search (after Cai et al. 2020 and Liu et al. 2019); never further than with the uniform one.",
    )
    candidates: Annotated[
        int, Field(ge=2, le=1000, description="For search evolutionary: how many sets of multipliers are looked at.")
    ] = 64
    criterion: Worth = "l2"
    round_to: RoundTo = 8
    keep_at_least: KeepAtLeast = 0.1
    samples: LookedAt = 256
    exclude: Annotated[tuple[Pattern, ...], Field(max_length=256)] = ()

    @model_validator(mode="after")
    def _consistent(self) -> ResizeWidth:
        if (self.multiplier is None) == (self.budget is None):
            raise ValueError("give exactly one of multiplier and budget")
        if self.search == "evolutionary" and self.budget is None:
            raise ValueError("search evolutionary finds multipliers within a budget: give budget instead of multiplier")
        if self.multiplier is not None and self.multiplier < self.keep_at_least:
            raise ValueError(
                f"multiplier {self.multiplier:g} is below keep_at_least, {self.keep_at_least:g}: give a smaller one"
            )
        return self

    @property
    def looks_at_samples(self) -> bool:
        """Whether it needs samples, labelled or not."""
        return self.criterion in BY_INPUTS or self.search == "evolutionary"


TakesUnits = StructuredPrune | ResizeWidth
"""Steps that take units out of groups."""
