"""Early stopping on a validation metric, and the best weights of a run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from app.contract.training import EarlyStopping
from worker.ranks.sharded import alike
from worker.training.states import State, check_alike, trained


class EarlyStopper:
    """Remembers the best epoch and says when to stop.

    Only trained values are remembered (parameters, running statistics), never the masks: the masks that stand when
    `restore` is called are those that hold, so no pruned weight can come back with an older state.
    """

    def __init__(self, module: nn.Module, rule: EarlyStopping) -> None:
        self.best = float("-inf")
        self.best_epoch: int | None = None
        self._module = module
        self._rule = rule
        self._waited = 0
        self._kept: dict[str, Tensor] = {}

    def judge(self, metric: float, epoch: int) -> bool:
        """Takes in the metric after an epoch (higher is better); true where the training should stop."""
        if self.best_epoch is None or metric > self.best + self._rule.min_delta:
            self.best, self.best_epoch, self._waited = metric, epoch, 0
            self._kept = {name: tensor.detach().clone() for name, tensor in trained(self._module)}
        else:
            self._waited += 1
        return self._waited >= self._rule.patience

    def restore(self) -> None:
        """Puts the values of the best epoch back, where there was one."""
        with torch.no_grad():
            for name, tensor in trained(self._module):
                if name in self._kept:
                    tensor.copy_(self._kept[name])

    def state(self) -> State:
        """What `load` needs."""
        kept = {f"kept.{name}": value for name, value in self._kept.items()}
        return {"best": self.best, "best_epoch": self.best_epoch, "waited": self._waited, **kept}

    def load(self, state: State) -> None:
        """Goes on from there."""
        self.best, self.best_epoch, self._waited = state["best"], state["best_epoch"], state["waited"]
        self._kept = {name[5:]: value for name, value in state.items() if name.startswith("kept.")}
        if self._kept:
            current = dict(trained(self._module))
            check_alike(current, self._kept)
            self._kept = {name: alike(value, current[name]) for name, value in self._kept.items()}
