"""What happens to masks along a training: a sparsity that grows, weights that move, weights that come back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from app.contract.pruning import Prune, Regrowth
from worker.constraints import stored
from worker.ranks.ranks import Ranks
from worker.techniques.pruning import schedule_math, scores_math, selection_math
from worker.techniques.pruning.choosing import Chooser
from worker.techniques.pruning.grain import Grain
from worker.techniques.pruning.noise import WeightNoise
from worker.techniques.pruning.weights import PrunableWeight, WeightSet
from worker.training.states import State


class Growing:
    """The loop's hook of schedules cubic and iterative: prunes at the steps that are due."""

    def __init__(
        self,
        step: Prune,
        chooser: Chooser,
        weights: WeightSet,
        ranks: Ranks | None = None,
        noise: WeightNoise | None = None,
    ) -> None:
        self._step, self._chooser, self._noise = step, chooser, noise
        self._moving = Moving(weights, ranks or Ranks()) if step.criterion == "movement" else None

    def __call__(self, step: int, total: int) -> bool:
        """Prunes where an update is due; true once the final sparsity is reached."""
        due = self._due(total)
        if self._noise is not None:
            self._noise.suit(total)
            self._noise.weaken(step, max(due))
        if self._moving is not None and step <= max(due):
            self._moving.gather()
        if step in due:
            self._prune(self._progress(step, due), last=step >= max(due))
        return step >= max(due)

    def state(self) -> State:
        """What a resumed training needs of it."""
        return self._moving.state() if self._moving is not None else {}

    def load(self, state: State) -> None:
        """Goes on from there."""
        if self._moving is not None:
            self._moving.load(state)

    def _due(self, total: int) -> range | list[int]:
        if self._step.schedule == "iterative":
            return schedule_math.beginnings(total, self._step.rounds)
        return schedule_math.updates(total)

    def _progress(self, step: int, due: range | list[int]) -> float:
        """The share of the way from the sparsity that was found to the one that is asked for."""
        if self._step.schedule == "cubic":
            return schedule_math.cubic(step, due[-1], 0.0, 1.0)
        begun = sum(one <= step for one in due)  # rounds of a short training begin at once
        return way(self._step, self._chooser, begun)

    def _prune(self, progress: float, last: bool) -> None:
        if self._moving is None:
            self._chooser.prune(progress)
        else:
            self._moving.prune(self._chooser, progress, last)


def way(step: Prune, chooser: Chooser, rounds: int) -> float:
    """The progress after so many rounds that each leave the same share of what they find."""
    assert step.sparsity is not None
    start = min(chooser.initial, step.sparsity)
    if start == step.sparsity:
        return 1.0
    return (schedule_math.geometric(rounds, step.rounds, start, step.sparsity) - start) / (step.sparsity - start)


class Moving:
    """Movement pruning: scores that every step of the training adds to, and masks that follow them until the last."""

    def __init__(self, weights: WeightSet, ranks: Ranks) -> None:
        self._weights, self._ranks = weights, ranks
        self._held = weights.kept()  # what earlier steps have pruned does not come back
        weights.only(self._held)
        self._masks = weights.layers()
        self._scores = [torch.zeros_like(value) for value in weights.values()]
        for mask in self._masks:
            mask.watched, mask.gradient = True, None

    def gather(self) -> None:
        """Adds what the last step says, of all processes."""
        for place, (weight, mask) in enumerate(zip(self._weights.weights, self._masks, strict=True)):
            if mask.gradient is not None:
                value = stored(weight.owner, weight.attribute).detach()
                gradient = self._ranks.total(mask.gradient)
                self._scores[place] = scores_math.movement(self._scores[place], value, gradient)
                mask.gradient = None

    def prune(self, chooser: Chooser, progress: float, last: bool) -> None:
        """Keeps those with the highest scores; before anything has moved, the largest."""
        moved = any(bool(score.any()) for score in self._scores)
        scores = self._scores if moved else [scores_math.magnitude(value) for value in self._weights.values()]
        dropped = chooser.choose(progress, scores, self._held)
        self._weights.only([held & ~gone for held, gone in zip(self._held, dropped, strict=True)])
        if last:
            self._weights.drop(dropped)
            for mask in self._masks:
                mask.watched, mask.gradient = False, None

    def state(self) -> State:
        found: State = {f"score.{place}": score for place, score in enumerate(self._scores)}
        gradients = {f"gradient.{place}": mask.gradient for place, mask in enumerate(self._masks)}
        return found | {name: gradient for name, gradient in gradients.items() if gradient is not None}

    def load(self, state: State) -> None:
        self._scores = [state[f"score.{place}"].clone() for place in range(len(self._scores))]
        for place, mask in enumerate(self._masks):
            found = state.get(f"gradient.{place}")
            mask.gradient = None if found is None else found.clone()


class Regrowing:
    """The loop's hook of RigL (Evci et al. 2020).

    At every exchange the smallest of the weights that are kept go, and as many of the others come back, at zero, whose
    gradients are largest. `after` is the hook that prunes, if one does.
    """

    def __init__(
        self,
        regrow: Regrowth,
        weights: WeightSet,
        grain: Grain,
        held: list[Tensor],
        ranks: Ranks,
        after: Growing | None,
    ) -> None:
        self._regrow, self._weights, self._grain, self._ranks = regrow, weights, grain, ranks
        self._held, self._after = held, after
        self._exchanged = 0

    def __call__(self, step: int, total: int) -> bool:
        """Exchanges where that is due; true once nothing changes any more."""
        final = self._after(step, total) if self._after is not None else True
        end = self._regrow.until * total
        masks = self._weights.layers()
        if self._is_due(step, end):
            self._exchange(self._regrow.share / 2 * (1 + math.cos(math.pi * step / end)))
        for mask in masks:  # an exchange looks at the gradients of the step before it
            mask.watched = self._is_due(step + 1, end)
        return final and step + self._regrow.every >= end

    def state(self) -> State:
        """What a resumed training needs of it."""
        masks = enumerate(self._weights.layers())
        found: State = {f"gradient.{place}": mask.gradient for place, mask in masks if mask.gradient is not None}
        return found | {"exchanged": self._exchanged}

    def load(self, state: State) -> None:
        """Goes on from there."""
        self._exchanged = int(state["exchanged"])
        for place, mask in enumerate(self._weights.layers()):
            found = state.get(f"gradient.{place}")
            mask.gradient = None if found is None else found.clone()

    @property
    def exchanged(self) -> int:
        """How many weights have come back."""
        return self._exchanged

    def _is_due(self, step: int, end: float) -> bool:
        return 0 < step < end and step % self._regrow.every == 0

    def _exchange(self, share: float) -> None:
        kept = self._weights.kept()
        for place, (weight, mask) in enumerate(zip(self._weights.weights, self._weights.layers(), strict=True)):
            if mask.gradient is not None:
                gradient, mask.gradient = self._ranks.total(mask.gradient), None
                kept[place] = self._of_one(weight, place, kept[place], gradient, share)
        self._weights.only(kept)

    def _of_one(self, weight: PrunableWeight, place: int, kept: Tensor, gradient: Tensor, share: float) -> Tensor:
        grain = self._grain
        units = grain.whole(weight, kept)
        free = grain.whole(weight, self._held[place])
        count = min(round(share * int(units.sum())), int((free & ~units).sum()))
        if count == 0:
            return kept
        sizes = grain.pooled(weight, scores_math.magnitude(weight.value()))
        going = selection_math.lowest_each([torch.where(units, sizes, torch.inf)], [torch.ones_like(units)], [count])[0]
        staying = units & ~going
        wanted = grain.pooled(weight, scores_math.gradient(gradient))
        wanted = torch.where(free & ~staying, wanted, -1.0)
        coming = ~selection_math.lowest_of_groups(wanted.reshape(1, -1), count).view(units.shape)
        back = grain.spread(weight, coming)
        with torch.no_grad():
            stored(weight.owner, weight.attribute).masked_fill_(back, 0.0)
        self._exchanged += int((coming & ~units).sum()) * (kept.numel() // units.numel())
        return grain.spread(weight, staying | coming)
