"""What the weights of a step are worth, by its criterion, as they stand when it is asked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from app.contract.pruning import Prune
from worker.context import Context
from worker.techniques.pruning import scores_math
from worker.techniques.pruning.gradients import mean_gradients, mean_squares
from worker.techniques.pruning.weights import WeightSet

Scorer = Callable[[], list[Tensor]]
"""A score an element of each weight, of its shape."""


def scorer(step: Prune, context: Context, weights: WeightSet) -> Scorer:
    """For every criterion that is asked of the weights alone, or of gradients that are measured for it.

    Raises DatasetMismatch, when asked, where gradients have no labelled training data.
    """
    match step.criterion:
        case "random":
            return _random(context, weights)
        case "gradient":
            return lambda: [scores_math.gradient(own) for own in mean_gradients(context, weights.weights, step.samples)]
        case "taylor":
            return lambda: _with(scores_math.taylor, weights, mean_gradients(context, weights.weights, step.samples))
        case "fisher":
            return lambda: _with(scores_math.fisher, weights, mean_squares(context, weights.weights, step.samples))
        case _:
            return lambda: [scores_math.magnitude(value) for value in weights.values()]


def _random(context: Context, weights: WeightSet) -> Scorer:
    """Drawn once, so that a sparsity that grows goes on with what it began."""
    generator = torch.Generator().manual_seed(context.seed)
    drawn = [scores_math.random(value.cpu(), generator).to(value.device) for value in weights.values()]
    return lambda: drawn


def _with(formula: Callable[[Tensor, Tensor], Tensor], weights: WeightSet, measured: list[Tensor]) -> list[Tensor]:
    return [formula(value, own) for value, own in zip(weights.values(), measured, strict=True)]
