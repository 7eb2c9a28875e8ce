"""Metrics that grow batch by batch, in one process or in a share of several."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from app.contract.errors import DatasetMismatch
from worker.ranks.ranks import Ranks

LARGEST = float(torch.finfo(torch.float64).max)
EMPTY = "The split is empty: a metric needs samples."
NOTHING = "Nothing in the split counts: every target is empty or ignored."

Make = Callable[[int], Mapping[str, Metric]]
"""The metrics by name for outputs of a width: how many classes, labels, or words there are."""


@dataclass(frozen=True)
class Scores:
    """The metric that a task is judged by, on how many samples, and what else is worth knowing, by name.

    Of the others, those that the data does not define are left out.
    """

    value: float
    samples: int
    others: Mapping[str, float] = field(default_factory=dict)


class Tally:
    """Metrics by name, the first of which is the one that the task is judged by.

    They are sums and counts, or small values that are kept: what comes of them hangs neither on the size of batches nor
    on who saw which.
    """

    def __init__(self, make: Make, nothing: str = NOTHING) -> None:
        self._make, self._nothing = make, nothing
        self._metrics: Mapping[str, Metric] = {}
        self._width = 0
        self._samples = 0
        self._counted = 0

    def update(self, samples: int, counted: int, width: int, values: Mapping[str, tuple[Any, ...]] | None) -> None:
        """Takes in a batch of `samples`, of which `counted` terms count.

        `values` are what each metric takes, None where there is nothing to take.
        """
        self._samples += samples
        self._counted += counted
        if values is None:
            return
        self._become(width)
        for name, metric in self._metrics.items():
            metric.update(*values[name])

    def scores(self, ranks: Ranks | None = None) -> Scores:
        """What comes of all batches, those of the other processes included; each of them has to ask.

        Raises DatasetMismatch where nothing counted, which has no metric.
        """
        ranks = ranks or Ranks()
        samples, counted, width = zip(*ranks.listed((self._samples, self._counted, self._width)), strict=True)
        if not sum(counted):
            raise DatasetMismatch(self._nothing if sum(samples) else EMPTY, pointer="/dataset")
        self._become(max(width))
        (_, value), *others = ((name, _value(metric, ranks)) for name, metric in self._metrics.items())
        # A broken artifact can be as bad as that, and a report is JSON.
        value = value if math.isfinite(value) else LARGEST
        return Scores(value, sum(samples), {name: each for name, each in others if math.isfinite(each)})

    def _become(self, width: int) -> None:
        if not self._metrics:
            self._metrics, self._width = self._make(width), width


def _value(metric: Metric, ranks: Ranks) -> float:
    def gather(state: Tensor, group: object = None) -> list[Tensor]:
        return ranks.listed(state)

    if ranks.size > 1:
        metric.sync(dist_sync_fn=gather, distributed_available=lambda: True)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of a process that had no batch
        found = metric.compute()
    value = float(found)
    # Ratios of counts are formed in float32, and no more digits are meant.
    return value if found.dtype == torch.float64 or not math.isfinite(value) else float(f"{value:.7g}")
