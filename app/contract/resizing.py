"""The resize step: a network gets fewer layers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from app.contract.budgets import Budget
from app.contract.pruning import Pattern
from app.contract.strict import Strict
from app.contract.training import Training

MOST_DROPPED = 1000  # as many layers as a network may have at all
DROP_LAYERS = "drop_layers"
OWN_METHODS = ("width", "connections")  # of resize, each a step of its own

Samples = Annotated[
    int, Field(ge=1, le=65_536, description="Samples that the network, gradients or outputs are looked at with.")
]


class Resize(Strict):
    """Takes whole blocks out of the network, such as layers of a transformer, those that do the least."""

    technique: Literal["resize"] = "resize"
    method: Literal["drop_layers"] = Field(
        "drop_layers",
        description="drop_layers: blocks that give the shape that they take are left out, as if each gave what came "
        "in.",
    )
    criterion: Literal["cosine", "taylor", "greedy"] = Field(
        "cosine",
        description="What a block does. cosine: one minus the cosine between what comes in and what goes out (block "
        "influence, Men et al. 2024). taylor: by how much the loss of a sample would change without it, to first "
        "order (after Molchanov et al. 2019). greedy: how far the outputs move without it, measured anew after each "
        "block that went.",
    )
    layers: Annotated[int | None, Field(ge=1, le=MOST_DROPPED, description="How many blocks go.")] = None
    budget: Budget | None = Field(None, description="Instead: the fewest blocks go that bring the model under it.")
    samples: Samples = 256
    exclude: Annotated[
        tuple[Pattern, ...], Field(max_length=256, description="Blocks that stay, by their name or a layer's in them.")
    ] = ()
    training: Training | None = Field(None, description="Training that follows, to recover.")

    @field_validator("method", mode="before")
    @classmethod
    def _known(cls, method: object) -> object:
        """The other methods are steps of their own, and would not be named."""
        if method != DROP_LAYERS:
            raise ValueError(f"method is one of {DROP_LAYERS}, {', '.join(OWN_METHODS)}")
        return method

    @model_validator(mode="after")
    def _amount(self) -> Resize:
        if (self.layers is None) == (self.budget is None):
            raise ValueError("give exactly one of layers and budget")
        return self

    @property
    def looks_at_samples(self) -> bool:
        """Whether it needs samples, labelled or not; else it needs labelled ones."""
        return self.criterion != "taylor"
