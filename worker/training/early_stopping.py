"""Early stopping on a validation metric, and the best weights of a run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from app.contract.training import EarlyStopping
from worker.constraints import Mask


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
        self._kept: list[tuple[Tensor, Tensor]] = []

    def judge(self, metric: float, epoch: int) -> bool:
        """Takes in the metric after an epoch (higher is better); true where the training should stop."""
        if self.best_epoch is None or metric > self.best + self._rule.min_delta:
            self.best, self.best_epoch, self._waited = metric, epoch, 0
            self._kept = [(tensor, tensor.detach().clone()) for tensor in _trained(self._module)]
        else:
            self._waited += 1
        return self._waited >= self._rule.patience

    def restore(self) -> None:
        """Puts the values of the best epoch back, where there was one."""
        with torch.no_grad():
            for tensor, value in self._kept:
                tensor.copy_(value)


def _trained(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    for layer in module.modules():
        if not isinstance(layer, Mask):
            yield from (buffer for buffer in layer._buffers.values() if buffer is not None)
