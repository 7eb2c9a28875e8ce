"""How far a training is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from torch import Tensor

from worker.training.states import State


@dataclass
class Place:
    """Steps in all, batches of this epoch, and what came of them so far.

    `order` is where the generator of the samples' order stood when the epoch began; None between two epochs. `final`:
    whether constraints are. `taught`: whether the last batch had nothing but a teacher to learn from.
    """

    step: int = 0
    batch: int = 0
    loss: float = 0.0
    means: list[float] = field(default_factory=list)
    order: Tensor | None = None
    final: bool = True
    taught: bool = False

    def state(self) -> State:
        """What `load` needs."""
        return {name.name: getattr(self, name.name) for name in dataclasses.fields(self)} | {"means": [*self.means]}

    def load(self, state: State) -> None:
        """Goes on from there."""
        for name in dataclasses.fields(self):
            setattr(self, name.name, state[name.name])
        self.means = list(self.means)
