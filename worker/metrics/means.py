"""Metrics that are means of what a task computes itself, in float64 where torchmetrics has float32."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

OPTIONS: dict[str, Any] = {"sync_on_compute": False}  # the tally does it, by the processes' own means


def exact(metric: Metric) -> Metric:
    """With sums in float64."""
    return metric.set_dtype(torch.float64)


def mean() -> Metric:
    """Of one value each. What is not a number is the model's doing, and stays that."""
    return exact(MeanMetric(nan_strategy="disable", **OPTIONS))


def exponential() -> Metric:
    """exp of a mean, as perplexity is of negative log-likelihoods.

    Those come from a log-softmax: torchmetrics' own takes the logarithm of probabilities, which may round to zero.
    """
    return exact(_Exponential(nan_strategy="disable", **OPTIONS))


def root() -> Metric:
    """The root of a mean, as of squared errors."""
    return exact(_Root(nan_strategy="disable", **OPTIONS))


def determination() -> Metric:
    """R2: the share of the values' variance that is predicted; not a number for one value, or equal ones."""
    return _Determination(**OPTIONS)


class _Exponential(MeanMetric):
    def compute(self) -> Tensor:
        return super().compute().exp()


class _Root(MeanMetric):
    def compute(self) -> Tensor:
        return super().compute().sqrt()


class _Determination(Metric):
    """From differences to means, which are joined as Chan et al. (1979) do: sums of squares of values that lie far from
    zero leave nothing but rounding when they are subtracted, as in torchmetrics' own (2.18)."""

    count: Tensor
    mean: Tensor
    spread: Tensor
    missed: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("count", "mean", "spread", "missed"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx=None)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """float64 [n] each."""
        mean = targets.mean()
        own = (torch.tensor(float(len(targets))), mean, (targets - mean).square().sum())
        self.count, self.mean, self.spread = _joined((self.count, self.mean, self.spread), own)
        self.missed = self.missed + (targets - outputs).square().sum()

    def compute(self) -> Tensor:
        parts = zip(*(state.reshape(-1) for state in (self.count, self.mean, self.spread)), strict=True)
        _, _, spread = functools.reduce(_joined, parts)
        return 1 - self.missed.sum() / spread if spread > 0 else torch.full((), torch.nan)


Spread = tuple[Tensor, Tensor, Tensor]
"""How many values, their mean, and the sum of their squared differences to it."""


def _joined(one: Spread, other: Spread) -> Spread:
    count = one[0] + other[0]
    share, apart = other[0] / count.clamp(min=1), other[1] - one[1]
    return count, one[1] + share * apart, one[2] + other[2] + apart.square() * one[0] * share
