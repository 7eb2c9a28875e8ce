"""Which features of a network belong together: groups that are as wide as each other and lose the same entries.

The features of a tensor are an `Axis`, a row of groups; None is an axis that stays whole, as those of the inputs do, of
the outputs, and what an unknown layer sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import TypeAlias

import torch
from torch import Tensor

Axis: TypeAlias = "tuple[Run, ...] | None"


@dataclass(frozen=True)
class Run:
    """One group's features, one behind the other, each `repeat` times in a row (as Flatten does with positions).

    Of three axes, `last` says that the features are the last one and not the one behind the batch.
    """

    group: int
    repeat: int = 1
    last: bool = False


@dataclass(frozen=True)
class Slice:
    """A dimension of a parameter that follows an axis; `scores` says that its group is judged by this weight."""

    name: str
    dim: int
    axis: Axis
    scores: bool = False


@dataclass(frozen=True)
class Edit:
    """An argument of a layer (its place in the state dict's words) that has the length of an axis."""

    layer: str
    argument: str
    axis: Axis


@dataclass
class Widths:
    """The groups of a network, as they are found, and what hangs on each."""

    sizes: list[int] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    _same: list[int] = field(default_factory=list)
    _whole: set[int] = field(default_factory=set)

    def new(self, size: int, *, last: bool) -> tuple[Run, ...]:
        """A group of its own."""
        self.sizes.append(size)
        self._same.append(len(self._same))
        return (Run(len(self._same) - 1, last=last),)

    def seen(self, axis: Axis, shape: tuple[int, ...], *, last: bool) -> Axis:
        """The axis as a layer sees it that computes on the last axis, or on the one behind the batch."""
        if axis is None or len(shape) == 2 or all(run.last == last for run in axis):
            return axis
        self.keep_whole(axis)
        return None

    def root(self, group: int) -> int:
        """The group that stands for all that were joined with this one."""
        while self._same[group] != group:
            group = self._same[group]
        return group

    def keep_whole(self, axis: Axis) -> None:
        """Takes the groups of an axis out of what can be narrowed."""
        self._whole |= {self.root(run.group) for run in axis or ()}

    def join(self, axes: Sequence[Axis]) -> Axis:
        """The axis of a sum: the groups at each place become one. Where the rows differ, all of them stay whole."""
        first, *others = axes
        for other in others:
            if first is None or other is None or [self._form(run) for run in first] != [self._form(r) for r in other]:
                for axis in axes:
                    self.keep_whole(axis)
                return None
            for a, b in zip(first, other, strict=True):
                self._unite(a.group, b.group)
        return first

    def _form(self, run: Run) -> tuple[int, int, bool]:
        return self.sizes[run.group], run.repeat, run.last

    def _unite(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        self._same[b] = a
        if b in self._whole:
            self._whole.add(a)

    def narrowable(self) -> set[int]:
        """Groups, by the one that stands for them, that may lose entries."""
        whole = {self.root(group) for group in self._whole}
        return {self.root(group) for group in range(len(self.sizes))} - whole

    def kept(self, state: Mapping[str, Tensor], share: float) -> dict[int, Tensor]:
        """The entries of each narrowable group that are kept, in order: those of the largest weights.

        A group is judged by the sum of the squared weights that make it, as magnitude pruning of filters does (Li et
        al. 2017); of `n` entries at least one and else share * n, rounded up, are kept.
        """
        scores = {group: torch.zeros(self.sizes[group]) for group in self.narrowable()}
        for cut in self.slices:
            if cut.scores and cut.axis is not None:
                self._score(scores, cut, state[cut.name])
        return {
            group: score.topk(max(1, ceil(share * len(score) - 1e-9))).indices.sort().values
            for group, score in scores.items()
        }

    def _score(self, scores: dict[int, Tensor], cut: Slice, weight: Tensor) -> None:
        assert cut.axis is not None
        energy = weight.float().square().movedim(cut.dim, 0).flatten(1).sum(1)
        for run, part in zip(cut.axis, energy.split([self.length(run) for run in cut.axis]), strict=True):
            group = self.root(run.group)
            if group in scores:
                scores[group] += part.reshape(-1, run.repeat).sum(1)

    def length(self, run: Run) -> int:
        return self.sizes[run.group] * run.repeat

    def indices(self, axis: tuple[Run, ...], kept: Mapping[int, Tensor]) -> Tensor:
        """Where the kept entries of an axis are, int64."""
        found, start = [], 0
        for run in axis:
            chosen = kept.get(self.root(run.group), torch.arange(self.sizes[run.group]))
            found.append((start + chosen[:, None] * run.repeat + torch.arange(run.repeat)).flatten())
            start += self.length(run)
        return torch.cat(found)

    def sliced(self, state: Mapping[str, Tensor], kept: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The state dict with the kept entries alone."""
        narrow = dict(state)
        for cut in self.slices:
            if cut.axis is not None and cut.name in narrow:
                narrow[cut.name] = narrow[cut.name].index_select(cut.dim, self.indices(cut.axis, kept))
        return narrow

    def lengths(self, kept: Mapping[int, Tensor]) -> dict[tuple[str, str], int]:
        """The new value of each argument, by layer and argument."""
        return {
            (edit.layer, edit.argument): len(self.indices(edit.axis, kept))
            for edit in self.edits
            if edit.axis is not None
        }
