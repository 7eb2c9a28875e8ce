"""The factorize step: layers become products of thinner ones."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.contract.budgets import TimedBudget
from app.contract.pruning import Pattern
from app.contract.strict import Strict
from app.contract.training import Training

OF_INPUTS = "activations"
OF_GRADIENTS = "fisher"


class Factorize(Strict):
    """Replaces layers by products of thinner ones (low rank), where that has fewer parameters and does less work."""

    technique: Literal["factorize"] = "factorize"
    method: Literal["auto", "svd", "tucker", "cp"] = Field(
        "auto",
        description="svd: Linear layers and convolutions of size 1 become two. tucker: larger convolutions become "
        "three, the middle one of few channels (Tucker-2; Kim et al. 2016). cp: they become one along each axis "
        "between two of size 1 (canonical polyadic; Lebedev et al. 2015). auto: svd and tucker.",
    )
    criterion: Literal["weights", "activations", "fisher"] = Field(
        "weights",
        description="What is kept closest. weights: the weights. activations: what the layers give for samples (after "
        "ASVD, Yuan et al. 2023, with the whole covariance of what comes in). fisher: weights, each output by the "
        "Fisher information of its row (FWSVD, Hsu et al. 2022).",
    )
    budget: TimedBudget | None = Field(None, description="Ranks are chosen for all layers together, to lose the least.")
    energy: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Each layer keeps this share of its energy, the sum of its squared values."),
    ] = None
    allocation: Literal["energy", "measured"] = Field(
        "energy",
        description="Of a budget, by what layers lose: energy, the share of each layer's own; measured, how far the "
        "network's outputs move on samples when it alone is factorized.",
    )
    samples: Annotated[
        int, Field(ge=1, le=65_536, description="Samples that inputs, gradients or outputs are looked at with.")
    ] = 256
    exclude: Annotated[tuple[Pattern, ...], Field(max_length=256)] = ()
    training: Training | None = Field(None, description="Training that follows, to recover.")

    @model_validator(mode="after")
    def _amount(self) -> Factorize:
        if (self.budget is None) == (self.energy is None):
            raise ValueError("give exactly one of budget and energy")
        if self.energy is not None and self.allocation == "measured":
            raise ValueError("allocation measured divides a budget: give budget instead of energy")
        return self

    @property
    def looks_at_samples(self) -> bool:
        """Whether it needs samples, labelled or not."""
        return self.criterion == OF_INPUTS or self.allocation == "measured"
