"""Which weights of a step go, at any point on its way to the sparsity that it asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from app.contract.errors import InvalidSpec
from app.contract.pruning import Prune
from worker.context import Context
from worker.techniques.base import Details
from worker.techniques.pruning import budgets_math, selection_math
from worker.techniques.pruning.grain import Grain
from worker.techniques.pruning.inputs import matrix, unmatrix
from worker.techniques.pruning.scoring import Scorer
from worker.techniques.pruning.sensitivity import LEVELS, curves
from worker.techniques.pruning.weights import PrunableWeight, WeightSet, matches


class Chooser:
    """Of one step: knows what each layer, or all together, are to remove in the end, and what they had removed before.

    Counts are of units of the grain, and exact. `details` has what was measured to find them.
    """

    def __init__(self, step: Prune, context: Context, weights: WeightSet, grain: Grain, scorer: Scorer) -> None:
        assert step.sparsity is not None
        self._step, self._weights, self._grain, self.scorer = step, weights, grain, scorer
        self.details: Details = {}
        self._sizes = [units.numel() for units in self._units(self._weights.kept())]
        self._before = [int((~units).sum()) for units in self._units(self._weights.kept())]
        own = [named_sparsity(step, weight) for weight in weights.weights]
        rest = [place for place, sparsity in enumerate(own) if sparsity is None]
        self._together = rest if step.within == "global" else []
        self._after = [
            size if sparsity is None else selection_math.removals(size, sparsity)
            for size, sparsity in zip(self._sizes, own, strict=True)
        ]
        if rest and not self._together:
            for place, count in zip(rest, self._counts(rest, context), strict=True):
                self._after[place] = count

    @property
    def initial(self) -> float:
        """The share of all units that was removed before this step."""
        return sum(self._before) / sum(self._sizes)

    @property
    def left(self) -> int:
        """How many weights are to be kept in the end."""
        units = [
            weight.value().numel() // size for weight, size in zip(self._weights.weights, self._sizes, strict=True)
        ]
        each = [place for place in range(len(self._sizes)) if place not in self._together]
        found = sum(units[i] * (self._sizes[i] - self._after[i]) for i in each)
        if self._together:
            assert self._step.sparsity is not None
            total = sum(self._sizes[i] * units[i] for i in self._together)
            found += total - selection_math.removals(total, self._step.sparsity)
        return max(1, found)

    def choose(self, progress: float, scores: list[Tensor], kept: list[Tensor]) -> list[Tensor]:
        """What goes of each weight (bool, of its shape), `progress` of the way from what was to what will be.

        `scores` and the masks `kept` are of the weights' shapes. Raises InvalidSpec where too few would be left.
        """
        pooled = [
            self._grain.pooled(weight, score) for weight, score in zip(self._weights.weights, scores, strict=True)
        ]
        units = self._units(kept)
        dropped: dict[int, Tensor] = {}
        if self._together:
            found = self._overall(progress, [pooled[i] for i in self._together], [units[i] for i in self._together])
            dropped = dict(zip(self._together, found, strict=True))
        each = [place for place in range(len(pooled)) if place not in dropped]
        counts = [self._before[i] + round(progress * max(0, self._after[i] - self._before[i])) for i in each]
        found = selection_math.lowest_each([pooled[i] for i in each], [units[i] for i in each], counts)
        dropped |= dict(zip(each, found, strict=True))
        return [self._grain.spread(weight, dropped[place]) for place, weight in enumerate(self._weights.weights)]

    def prune(self, progress: float) -> None:
        """Drops what goes by now, beside what is dropped already."""
        self._weights.drop(self.choose(progress, self.scorer(), self._weights.kept()))

    def minimum(self, place: int) -> int:
        """How many weights a layer keeps at least."""
        if place not in self._together:
            return 1
        assert self._step.sparsity is not None
        unit = self._weights.weights[place].value().numel() // self._sizes[place]
        return unit * selection_math.floor(self._sizes[place], self._step.sparsity)

    def _units(self, masks: list[Tensor]) -> list[Tensor]:
        return [self._grain.whole(weight, mask) for weight, mask in zip(self._weights.weights, masks, strict=True)]

    def _overall(self, progress: float, scores: list[Tensor], units: list[Tensor]) -> list[Tensor]:
        final = self._step.sparsity
        assert final is not None
        before = sum(self._before[i] for i in self._together) / sum(self._sizes[i] for i in self._together)
        start = min(before, final)  # a step after another starts from what it finds, and never goes back
        try:
            return selection_math.lowest_overall(scores, units, start + progress * (final - start))
        except ValueError as error:
            raise InvalidSpec(
                f"A sparsity of {final:g} leaves too few of {self._weights.total()} weights for "
                f"{len(self._weights.weights)} layers, which keep one each at least. Use a lower sparsity."
            ) from error

    def _counts(self, rest: list[int], context: Context) -> list[int]:
        """How many units each of these layers is to remove."""
        sparsity = self._step.sparsity
        assert sparsity is not None
        sizes = [self._sizes[place] for place in rest]
        if self._step.within == "layer":
            return [selection_math.removals(size, sparsity) for size in sizes]
        weights = [self._weights.weights[place] for place in rest]
        if self._step.within == "erk":
            shares = budgets_math.erk([tuple(weight.value().shape) for weight in weights], sparsity)
        else:
            shares = self._measured(rest, context)
        return selection_math.apportioned(sizes, shares, selection_math.removals(sum(sizes), sparsity))

    def _measured(self, rest: list[int], context: Context) -> list[float]:
        """By a sensitivity curve of each layer, which `details` keeps."""
        scores, kept = self.scorer(), self._weights.kept()
        weights = [self._weights.weights[place] for place in rest]

        def dropped(number: int, level: float) -> Tensor:
            place = rest[number]
            weight = self._weights.weights[place]
            pooled = self._grain.pooled(weight, scores[place])
            units = self._grain.whole(weight, kept[place])
            count = selection_math.removals(pooled.numel(), level)
            return self._grain.spread(weight, selection_math.lowest_each([pooled], [units], [count])[0])

        # One process measures: what is chosen is to be the same for all.
        losses = context.ranks.told(lambda: curves(context, weights, dropped, self._step.samples))
        self.details["sensitivity"] = [
            {"layer": weight.name, "sparsity": level, "divergence": loss}
            for weight, own in zip(weights, losses, strict=True)
            for level, loss in zip(LEVELS, own, strict=True)
        ]
        assert self._step.sparsity is not None
        return budgets_math.allotted([self._sizes[place] for place in rest], LEVELS, losses, self._step.sparsity)


def drop_groups(step: Prune, weights: WeightSet, scores: list[Tensor]) -> None:
    """N of every M weights stay: those with the highest scores."""
    assert step.n_of_m is not None
    keep, size = step.n_of_m
    dropped = []
    for weight, score, kept in zip(weights.weights, scores, weights.kept(), strict=True):
        rows = matrix(weight, torch.where(kept, score.float(), -torch.inf)).reshape(-1, size)
        dropped.append(unmatrix(weight, selection_math.lowest_of_groups(rows, keep)))
    weights.drop(dropped)


def named_sparsity(step: Prune, weight: PrunableWeight) -> float | None:
    """The sparsity that a layer is given by name."""
    return next((own for pattern, own in step.layers.items() if matches(weight, pattern)), None)
