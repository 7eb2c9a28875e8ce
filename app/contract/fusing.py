"""The fuse step: what a network computes for nothing leaves it, and it gives what it gave."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from app.contract.pruning import Pattern
from app.contract.strict import Strict

Pass = Literal["batch_norm", "constants", "identities", "common", "dead"]
PASSES: tuple[Pass, ...] = ("batch_norm", "constants", "identities", "common", "dead")


class Fuse(Strict):
    """Leaves out what a trained network need not compute: batch norms that a layer's weights can hold, constants, what
    changes nothing, what is computed twice, and what no output needs."""

    technique: Literal["fuse"] = "fuse"
    passes: Annotated[tuple[Pass, ...], Field(min_length=1, max_length=len(PASSES))] = Field(
        PASSES,
        description="batch_norm: a batch norm behind a Linear layer or a convolution, or in front of one that does not "
        "pad, goes into its weights. constants: what programs and graphs compute of constants is stored. identities: "
        "what changes nothing goes. common: what is computed twice is computed once. dead: what no output needs goes, "
        "weights included.",
    )
    for_inference: bool = Field(
        False,
        description="Whether dropout and detach, which matter in a training alone, count as identities: none may "
        "follow.",
    )
    exclude: Annotated[
        tuple[Pattern, ...], Field(max_length=256, description="Layers, or batch norms, whose batch norm stays.")
    ] = ()

    @field_validator("passes")
    @classmethod
    def _each_once(cls, passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
        if len(set(passes)) != len(passes):
            raise ValueError("passes names one twice")
        return passes
