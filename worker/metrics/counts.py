"""Metrics of classes from three counts a class: torchmetrics' own fill a matrix of classes by classes (2.18: 800 MB for
10,000), and take classes that do not occur into balanced accuracy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class _Counts(Metric):
    """How often each class was found, was said, and is the truth: int64 [classes] each."""

    found: Tensor
    said: Tensor
    true: Tensor

    def __init__(self, classes: int, **options: Any) -> None:
        super().__init__(**options)
        self._classes = classes
        for name in ("found", "said", "true"):
            self.add_state(name, torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, said: Tensor, true: Tensor) -> None:
        """Classes int64 [n] of n samples, as the model has them and as they are."""
        for state, chosen in ((self.found, true[said == true]), (self.said, said), (self.true, true)):
            state += torch.bincount(chosen, minlength=self._classes)


class BalancedAccuracy(_Counts):
    """The mean, over the classes that occur, of the share of their samples that is found."""

    def compute(self) -> Tensor:
        occur = self.true > 0
        return (self.found[occur].double() / self.true[occur]).mean()


class MacroF1(_Counts):
    """The mean, over the classes that occur or are said, of the harmonic mean of precision and recall."""

    def compute(self) -> Tensor:
        either = self.said + self.true
        return (2 * self.found[either > 0].double() / either[either > 0]).mean()
