"""The resize step with method connections: ways through the network go, and what they met goes on without them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.contract.budgets import Budget
from app.contract.pruning import Pattern
from app.contract.resizing import MOST_DROPPED, Samples
from app.contract.strict import Strict
from app.contract.training import Training

What = Literal["branches", "skips", "gates"]


class Rewire(Strict):
    """Takes connections out of the network, such as the residual branches of a transformer or of a ResNet, those that
    do the least."""

    technique: Literal["resize"] = "resize"
    method: Literal["connections"] = "connections"
    what: What = Field(
        "branches",
        description="What goes where two ways from one place meet. branches: of a sum a way with weights (attention or "
        "feed-forward layers of a transformer, convolutions of a residual block), with all that nothing else reads. "
        "skips: of a sum the way without weights, around such a branch. gates: of a product a factor with weights "
        "(squeeze-and-excitation).",
    )
    criterion: Literal["cosine", "taylor", "greedy"] = Field(
        "cosine",
        description="What a connection does. cosine: one minus the cosine between what stays at its place and what was "
        "there with it (He et al. 2024). taylor: by how much the loss of a sample would change without it, to first "
        "order (after Molchanov et al. 2019). greedy: how far the outputs move without it, measured anew after each "
        "that went.",
    )
    connections: Annotated[int | None, Field(ge=1, le=MOST_DROPPED, description="How many go.")] = None
    budget: Budget | None = Field(None, description="Instead: the fewest go that bring the model under it.")
    samples: Samples = 256
    exclude: Annotated[
        tuple[Pattern, ...], Field(max_length=256, description="Connections that stay, by a layer's name in them.")
    ] = ()
    training: Training | None = Field(None, description="Training that follows, to recover.")

    @model_validator(mode="after")
    def _amount(self) -> Rewire:
        if (self.connections is None) == (self.budget is None):
            raise ValueError("give exactly one of connections and budget")
        if self.what == "skips" and self.budget is not None:
            raise ValueError("skips have no weights, so no budget is met without them: give connections")
        return self

    @property
    def looks_at_samples(self) -> bool:
        """Whether it needs samples, labelled or not; else it needs labelled ones."""
        return self.criterion != "taylor"
