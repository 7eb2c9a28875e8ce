"""What a tensor carries through a labelled pass, and how labels lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from worker.structure.tracing.classes import NONE, Classes

Labels: TypeAlias = Tensor
"""Of an activation: int64 in its shape, the channel that each element is of, or NONE."""


@dataclass(frozen=True)
class Weight:
    """What a parameter carries: labels for each of its dimensions, along it."""

    dims: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(own) for own in self.dims)


Carried: TypeAlias = "Labels | Weight | None"


class Layout:
    """Questions about labels, and what follows for classes from where these lie."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self._split: list[Tensor] = []  # labels that lay along several dimensions

    def varying(self, labels: Labels) -> list[int]:
        """The dimensions along which classes differ."""
        roots = self.classes.roots(_reduced(labels))
        return [
            dim for dim, size in enumerate(roots.shape) if size > 1 and bool((roots != roots.narrow(dim, 0, 1)).any())
        ]

    def along(self, labels: Labels, dim: int) -> Tensor:
        """The labels at the first place of all other dimensions."""
        dim %= labels.ndim
        for other in range(labels.ndim - 1, -1, -1):
            if other != dim:
                labels = labels.select(other, 0)
        return labels

    def merge(self, labels: Labels, dim: int) -> bool:
        """Unites along a dimension: only what lies at the same place of the others may go apart, and nothing where some
        are none. Returns whether there was anything to unite."""
        labels = _reduced(labels)
        if labels.shape[dim] == 1:
            return False
        if bool((labels == NONE).any()):
            self.classes.freeze(labels, "some of what it is joined with is no channel")
        return self.classes.unite(labels.narrow(dim, 0, 1).expand_as(labels).reshape(-1), labels.reshape(-1))

    def keep_outermost(self, labels: Labels) -> None:
        """Leaves one dimension at most along which classes differ, the first.

        Of heads and what is in them the heads: their size is part of what attention computes.
        """
        for dim in self.varying(labels)[1:]:
            self.merge(labels, dim)

    def only(self, labels: Labels, dim: int, why: str) -> Tensor:
        """The labels along a dimension. Where others lie along other ones, all have to stay."""
        if any(own != dim % labels.ndim for own in self.varying(labels)):
            self.classes.freeze(labels, why)
        return self.along(labels, dim)

    def remember(self, labels: Labels) -> None:
        """For `settle`: labels of a shape that has been taken apart or put together."""
        if len(self.varying(labels)) > 1:
            self._split.append(_reduced(labels).clone())

    def settle(self) -> None:
        """Makes all remembered shapes such that they stay boxes: classes differ along one dimension only, the one with
        the most of them."""
        again = True
        while again:
            again = False
            for labels in self._split:
                dims = self.varying(labels)
                kept = max(dims, key=lambda dim: labels.shape[dim], default=None)
                for dim in dims:
                    if dim != kept:
                        again |= self.merge(labels, dim)

    def activation(self, weight: Weight, why: str) -> Labels:
        """A parameter as what is computed with: of its dimensions the last that is one may lose entries."""
        kept = next((dim for dim in range(len(weight.dims) - 1, -1, -1) if len(weight.dims[dim]) > 1), None)
        for dim, own in enumerate(weight.dims):
            if dim != kept:
                self.classes.freeze(own, why)
        if kept is None:
            return torch.zeros(weight.shape, dtype=torch.int64)
        return spread(weight.dims[kept], kept, weight.shape)

    def tie(self, weight: Weight, labels: Labels, why: str) -> None:
        """Of a parameter that meets an activation, dimension by dimension from the last on, element by element."""
        dims = self.varying(labels)
        for back, own in enumerate(reversed(weight.dims), 1):
            if len(own) == 1:
                continue
            dim = labels.ndim - back
            if dims == [dim]:
                self.classes.unite(own, self.along(labels, dim))
                self.classes.freeze(own[self.along(labels, dim) == NONE], why)
            else:
                self.classes.freeze(own, why)
                if dim in dims:
                    self.merge_or_freeze(labels, dim, why)

    def merge_or_freeze(self, labels: Labels, dim: int, why: str) -> None:
        """For labels that meet a tensor whose dimension cannot change."""
        if self.varying(labels) == [dim]:
            self.classes.freeze(labels, why)
        else:
            self.merge(labels, dim)


def spread(along: Tensor, dim: int, shape: Sequence[int]) -> Labels:
    """Labels along one dimension, the same everywhere else; takes no more memory than those."""
    view = [1] * len(shape)
    view[dim] = -1
    return along.view(view).expand(tuple(shape))


def together(*labels: Labels) -> list[Labels]:
    """Of one shape, without what is there again in all of them, in dimensions of stride 0."""
    for dim, size in enumerate(labels[0].shape):
        if size > 1 and all(own.stride(dim) == 0 for own in labels):
            labels = tuple(own.narrow(dim, 0, 1) for own in labels)
    return list(labels)


def _reduced(labels: Labels) -> Labels:
    return together(labels)[0]
