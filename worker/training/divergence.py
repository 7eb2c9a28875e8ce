"""When a training has gone astray: a loss or a weight that is no number, or a loss that explodes."""

from __future__ import annotations

from typing import Any

from worker.training.states import State

# The loss is smoothed over about so many steps: single bad batches are no divergence.
SMOOTHED = 10
# A smoothed loss this many times that of the beginning, or of 1 where it began lower, has exploded.
EXPLODED = 5.0
# With less than this many times, the state is good enough to come back to.
SOUND = 2.0
# What is left of the rate after one retry. Four of them make it 256 times smaller.
CUT = 0.25


class Diverged(Exception):
    """The training has gone astray; the message says how, without a full stop."""


class Guard:
    """Watches the losses, and counts how often the training was brought back.

    The loss of the beginning is that of the first step that may be judged, before which nothing has gone astray. None
    may before constraints are final, for a growing sparsity raises the loss and means to.
    """

    def __init__(self, retries: int) -> None:
        self.incidents: list[dict[str, Any]] = []
        self.retries = retries
        self._first: float | None = None
        self._smoothed = 0.0

    @property
    def factor(self) -> float:
        """On the learning rate."""
        return float(CUT ** len(self.incidents))

    @property
    def exhausted(self) -> bool:
        """Whether it was brought back as often as it may be."""
        return len(self.incidents) >= self.retries

    @property
    def sound(self) -> bool:
        """Whether the state is worth coming back to."""
        return self._first is None or self._smoothed <= SOUND * max(1.0, abs(self._first))

    def watch(self, loss: float, final: bool) -> None:
        """Takes in the loss of a step; `final` says whether constraints are. Raises Diverged.

        Without any retries there is nothing to be done about a loss that is a number.
        """
        if not final or not self.retries:
            self._first = None
        elif self._first is None:
            self._first = self._smoothed = loss
        else:
            self._smoothed += (loss - self._smoothed) / SMOOTHED
            if self._smoothed > EXPLODED * max(1.0, abs(self._first)):
                raise Diverged(f"The training loss grew to {self._smoothed:.3g}, having begun at {self._first:.3g}")

    def state(self) -> State:
        """What `load` needs."""
        return {"incidents": self.incidents, "first": self._first, "smoothed": self._smoothed}

    def load(self, state: State) -> None:
        """Goes on from there."""
        self.incidents = list(state["incidents"])
        self._first, self._smoothed = state["first"], state["smoothed"]
