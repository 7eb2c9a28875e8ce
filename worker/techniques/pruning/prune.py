"""Unstructured magnitude pruning: by sparsity or threshold, over all layers or in each, at once or gradually."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from app.contract.errors import InvalidSpec
from app.contract.spec import Prune
from worker.context import Context
from worker.model import Model
from worker.techniques.base import Details
from worker.techniques.pruning import magnitude_math, schedule_math
from worker.techniques.pruning.weights import PrunableWeight, WeightSet, prunable, select
from worker.training.finding.settle import settle
from worker.training.loop import train


class PruneTechnique:
    """Sets the smallest weights to zero, by masks that every later step keeps."""

    name: ClassVar[str] = "prune"

    def applies(self, step: Prune, model: Model) -> str | None:
        """A network needs a Linear, convolution, Embedding, recurrent or attention layer.

        Raises InvalidSpec where `exclude` names none of them, or all.
        """
        if step.training is not None and not model.facts.trainable:
            return model.facts.untrainable_reason
        if not prunable(model.module):
            return "The model has no layer with weights that can be pruned."
        select(model.module, step.exclude)
        return None

    def apply(self, step: Prune, context: Context) -> Details:
        """Prunes, and trains where the step says so; one_shot before the training, cubic during it."""
        module = context.model.module
        weights = WeightSet(module, select(module, step.exclude))
        found: Details = {}
        if step.schedule == "cubic":
            assert step.training is not None
            gradual = Gradual(step, weights)
            training, found = settle(context, step.training)
            found |= train(context, training, gradual).details()
        else:
            _prune(step, weights, step.sparsity)
            if step.training is not None:
                training, found = settle(context, step.training)
                found |= train(context, training).details()
        return _details(step, weights) | found


class Gradual:
    """The loop's hook that lets the sparsity grow along the cubic."""

    def __init__(self, step: Prune, weights: WeightSet) -> None:
        self._step = step
        self._weights = weights
        self._initial = weights.removed() / weights.total()

    def __call__(self, step: int, total: int) -> bool:
        """Prunes where an update is due; true once the final sparsity is reached."""
        assert self._step.sparsity is not None
        due = schedule_math.updates(total)
        if step in due:
            # A step after another prune step starts from the sparsity that it finds, and never goes back.
            start = min(self._initial, self._step.sparsity)
            _prune(self._step, self._weights, schedule_math.cubic(step, due[-1], start, self._step.sparsity))
        return step >= due[-1]


def _prune(step: Prune, weights: WeightSet, sparsity: float | None) -> None:
    """One pruning of the whole set; `sparsity` stands in place of the step's while it grows."""
    if sparsity is None:
        assert step.threshold is not None
        dropped = magnitude_math.below(weights.values(), step.threshold)
        _refuse_emptied(weights, dropped, step.threshold)
        weights.drop(dropped)
        return
    choose = magnitude_math.smallest_overall if step.scope == "global" else magnitude_math.smallest_each
    try:
        weights.drop(choose(weights.values(), weights.kept(), sparsity))
    except ValueError as error:
        raise InvalidSpec(
            f"A sparsity of {step.sparsity:g} leaves too few of {weights.total()} weights for "
            f"{len(weights.weights)} layers, which keep one each at least. Use a lower sparsity."
        ) from error


def _refuse_emptied(weights: WeightSet, dropped: list[Tensor], threshold: float) -> None:
    """A threshold above all weights of a layer would cut the network: refused, naming the layer."""
    for weight, value, gone in zip(weights.weights, weights.values(), dropped, strict=True):
        if gone.all() and value.any():
            raise InvalidSpec(
                f"The threshold {threshold:g} removes every weight of {weight.name}, whose largest is "
                f"{float(value.abs().max()):.3g}. Use a lower threshold, or exclude {(weight.layer or weight.name)!r}."
            )


def _details(step: Prune, weights: WeightSet) -> Details:
    """Totals, and a row a layer; `minimum` is what a layer keeps at least, null where a threshold decided."""
    layers = [_layer(step, weight, kept) for weight, kept in zip(weights.weights, weights.kept(), strict=True)]
    removed, total = weights.removed(), weights.total()
    return {
        "prunable_weights": total,
        "removed_weights": removed,
        "sparsity": removed / total,
        "layers_held_at_minimum": sum(row["kept"] == row["minimum"] for row in layers),
        "layers": layers,
    }


def _layer(step: Prune, weight: PrunableWeight, kept: Tensor) -> dict[str, float | int | str | None]:
    count, left = kept.numel(), int(kept.count_nonzero())
    minimum = None
    if step.sparsity is not None:
        minimum = magnitude_math.floor(count, step.sparsity) if step.scope == "global" else 1
    return {"name": weight.name, "weights": count, "kept": left, "sparsity": 1 - left / count, "minimum": minimum}
