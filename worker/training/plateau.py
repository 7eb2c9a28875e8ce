"""Reduce-on-plateau: the one schedule that follows the training instead of the step."""

from __future__ import annotations

from app.contract.training import Training
from worker.training.states import State


class Plateau:
    """Cuts the rate by `gamma` when the validation metric was not better for more than `plateau_patience` epochs.

    A metric is better if it is above the best so far by a ten-thousandth of it, as in torch's ReduceLROnPlateau: less
    is noise. The rate never falls below `end_factor` times the peak.
    """

    THRESHOLD = 1e-4

    def __init__(self, training: Training) -> None:
        self.factor = 1.0
        self._gamma, self._patience, self._least = training.gamma, training.plateau_patience, training.end_factor
        self._best = float("-inf")
        self._waited = 0

    def judge(self, metric: float) -> None:
        """Takes in the metric after an epoch; higher is better."""
        if metric > self._best + abs(self._best) * self.THRESHOLD or self._best == float("-inf"):
            self._best, self._waited = metric, 0
        else:
            self._waited += 1
        if self._waited > self._patience:
            self.factor, self._waited = max(self.factor * self._gamma, self._least), 0

    def state(self) -> State:
        """What `load` needs."""
        return {"factor": self.factor, "best": self._best, "waited": self._waited}

    def load(self, state: State) -> None:
        """Goes on from there."""
        self.factor, self._best, self._waited = state["factor"], state["best"], state["waited"]
