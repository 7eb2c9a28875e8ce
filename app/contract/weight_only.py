"""The quantize step with method weight_only: weights of few bits, activations as they are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.contract.grouping import Grouped
from app.contract.pruning import Pattern


class FewBits(Grouped):
    """What the methods have in common whose weights become whole numbers times a step that neighbouring ones share."""

    technique: Literal["quantize"] = "quantize"
    algorithm: Literal["rtn", "hqq", "awq", "gptq", "awq+gptq"] = Field(
        "gptq",
        description="rtn: each weight to the nearest, on the grid with the least squared error. hqq: zero points that "
        "are no whole numbers, so that most weights are hit well and outliers are forgiven (Badri & Shaji 2023). awq: "
        "channels that carry much are made larger first (Lin et al. 2023). gptq: so that what the layers give changes "
        "least (Frantar et al. 2023). awq+gptq: larger first, and then so. All but rtn and hqq need data without "
        "labels.",
    )
    samples: Annotated[int, Field(ge=1, le=65_536, description="Samples that all but rtn and hqq look at.")] = 128
    exclude: Annotated[tuple[Pattern, ...], Field(max_length=256)] = ()

    @property
    def looks_at_inputs(self) -> bool:
        """Whether its algorithm needs samples."""
        return self.algorithm not in ("rtn", "hqq")

    @property
    def moves_zeros(self) -> bool:
        """Whether zero points are no whole numbers."""
        return self.algorithm == "hqq"

    @property
    def scales_channels(self) -> bool:
        """Whether channels that carry much are made larger first."""
        return self.algorithm in ("awq", "awq+gptq")

    @property
    def makes_up(self) -> bool:
        """Whether columns make up for the rounding of those before."""
        return self.algorithm in ("gptq", "awq+gptq")

    @model_validator(mode="after")
    def _zeros(self) -> FewBits:
        if self.moves_zeros and self.symmetric:
            raise ValueError("hqq finds zero points, and symmetric leaves them out: take rtn, awq or gptq, or not both")
        return self


class WeightOnly(FewBits):
    """Weights become whole numbers of few bits times a step that neighbouring ones share; activations stay floats."""

    method: Literal["weight_only"] = "weight_only"
    bits: Literal[8, 4, 3, 2] = 4
    embeddings: Literal[8, 4, 2] | None = Field(
        None,
        description="Bits of embeddings, and of heads that are their weight, each rounded to the nearest; null leaves "
        "them in floats.",
    )

    @property
    def of_embeddings(self) -> WeightOnly:
        """How embeddings are rounded."""
        return self.model_copy(update={"algorithm": "rtn"})
