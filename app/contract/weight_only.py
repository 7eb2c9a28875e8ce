"""The quantize step with method weight_only: weights of few bits, activations as they are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.contract.pruning import Pattern
from app.contract.strict import Strict

LEAST_GROUP, MOST_GROUP = 16, 256


class WeightOnly(Strict):
    """Weights become whole numbers of few bits times a step that neighbouring ones share; activations stay floats."""

    technique: Literal["quantize"] = "quantize"
    method: Literal["weight_only"] = "weight_only"
    bits: Literal[8, 4, 3, 2] = 4
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
    algorithm: Literal["rtn", "awq", "gptq", "awq+gptq"] = Field(
        "gptq",
        description="rtn: each weight to the nearest, on the grid with the least squared error. awq: channels that "
        "carry much are made larger first (Lin et al. 2023). gptq: so that what the layers give changes least (Frantar "
        "et al. 2023). awq+gptq: larger first, and then so. All but rtn need data without labels.",
    )
    samples: Annotated[int, Field(ge=1, le=65_536, description="Samples that all but rtn look at.")] = 128
    embeddings: Literal[8, 4, 2] | None = Field(
        None,
        description="Bits of embeddings, and of heads that are their weight, each rounded to the nearest; null leaves "
        "them in floats.",
    )
    exclude: Annotated[tuple[Pattern, ...], Field(max_length=256)] = ()

    @property
    def looks_at_inputs(self) -> bool:
        """Whether it needs samples."""
        return self.algorithm != "rtn"

    @property
    def scales_channels(self) -> bool:
        """Whether channels that carry much are made larger first."""
        return self.algorithm in ("awq", "awq+gptq")

    @property
    def makes_up(self) -> bool:
        """Whether columns make up for the rounding of those before."""
        return self.algorithm in ("gptq", "awq+gptq")

    @property
    def of_embeddings(self) -> WeightOnly:
        """How embeddings are rounded."""
        return self.model_copy(update={"bits": self.embeddings, "algorithm": "rtn"})

    @model_validator(mode="after")
    def _power(self) -> WeightOnly:
        if self.group_size is not None and self.group_size & (self.group_size - 1):
            raise ValueError(f"group_size is a power of two; it is {self.group_size}")
        return self
