"""The metrics of each kind of task, by name; the first is the one that it is judged by. docs/metrics.md defines them.

Arguments are checked by the tasks: torchmetrics' own checks look at every value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassCalibrationError,
    MultilabelAveragePrecision,
    MultilabelExactMatch,
    MultilabelF1Score,
)
from torchmetrics.text import CharErrorRate, WordErrorRate

from worker.metrics.counts import BalancedAccuracy, MacroF1
from worker.metrics.means import OPTIONS, determination, exact, exponential, mean, root

BINS = 15  # of confidence (Guo et al. 2017)
MANY = 5  # classes; with more, the five likeliest are looked at too
BLOCK = 512  # rows whose similarities to all others are held at once

_UNCHECKED: dict[str, Any] = {"validate_args": False, **OPTIONS}


def of_classes(width: int) -> Mapping[str, Metric]:
    """One class a sample."""
    count = max(2, width)
    found = {
        "accuracy": mean(),
        "balanced_accuracy": BalancedAccuracy(count, **OPTIONS),
        "macro_f1": MacroF1(count, **OPTIONS),
        "log_loss": mean(),
        "calibration_error": MulticlassCalibrationError(count, n_bins=BINS, **_UNCHECKED),
    }
    return found | {"top_5_accuracy": mean()} if width > MANY else found


def of_tags(width: int) -> Mapping[str, Metric]:
    """One class a word."""
    return {"accuracy": mean(), "macro_f1": MacroF1(max(2, width), **OPTIONS), "log_loss": mean()}


def of_tokens(width: int) -> Mapping[str, Metric]:
    """The token at each place."""
    return {"perplexity": exponential(), "log_loss": mean(), "token_accuracy": mean()}


def of_speech(width: int) -> Mapping[str, Metric]:
    """Text as it was said."""
    return {"word_error_rate": exact(WordErrorRate(**OPTIONS)), "character_error_rate": exact(CharErrorRate(**OPTIONS))}


def of_values(width: int) -> Mapping[str, Metric]:
    """Numbers."""
    return {
        "mean_squared_error": mean(),
        "root_mean_squared_error": root(),
        "mean_absolute_error": mean(),
        "r2": determination(),
    }


def of_labels(width: int) -> Mapping[str, Metric]:
    """Several labels a sample, each on its own."""
    return {
        # Where there is nothing to say and nothing is said, all of that is right.
        "f1": MultilabelF1Score(width, average="micro", zero_division=1, **_UNCHECKED),
        "macro_f1": MultilabelF1Score(width, average="macro", **_UNCHECKED),
        "mean_average_precision": MultilabelAveragePrecision(width, **_UNCHECKED),
        "exact_match": MultilabelExactMatch(width, **_UNCHECKED),
    }


def of_vectors(width: int) -> Mapping[str, Metric]:
    """Embeddings of samples that have classes."""
    return {"nearest_neighbour_accuracy": NearestNeighbour(**OPTIONS)}


class NearestNeighbour(Metric):
    """The share of samples whose nearest other sample, by the cosine, has the same class (leave-one-out 1-NN)."""

    vectors: list[Tensor]
    classes: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("vectors", [], dist_reduce_fx="cat")
        self.add_state("classes", [], dist_reduce_fx="cat")

    def update(self, vectors: Tensor, classes: Tensor) -> None:
        """float [n, dimensions] and int64 [n]."""
        self.vectors.append(functional.normalize(vectors.float(), dim=-1))
        self.classes.append(classes)

    def compute(self) -> Tensor:
        """In float64; 0 for a sample alone."""
        vectors, classes = (_joined(state) for state in (self.vectors, self.classes))
        if len(vectors) == 1:
            return torch.zeros((), dtype=torch.float64)
        agree = 0
        for start in range(0, len(vectors), BLOCK):
            similarity = vectors[start : start + BLOCK] @ vectors.T
            rows = torch.arange(len(similarity))
            similarity[rows, rows + start] = -torch.inf  # not with itself
            agree += int((classes[similarity.argmax(1)] == classes[start : start + BLOCK]).sum())
        return torch.tensor(agree / len(vectors), dtype=torch.float64)


def _joined(state: list[Tensor] | Tensor) -> Tensor:
    """What was kept in parts, and what the processes' parts were made into."""
    return torch.cat(state) if isinstance(state, list) else state
