"""Metrics that are means of what a task computes itself, in float64 where torchmetrics has float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, R2Score

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
    return exact(_Determination(**OPTIONS))


class _Exponential(MeanMetric):
    def compute(self) -> Tensor:
        return super().compute().exp()


class _Root(MeanMetric):
    def compute(self) -> Tensor:
        return super().compute().sqrt()


class _Determination(R2Score):
    def compute(self) -> Tensor:
        spread = self.sum_squared_error - self.sum_error**2 / self.total
        return torch.full((), torch.nan) if self.total < 2 or not (spread > 0).all() else super().compute()
