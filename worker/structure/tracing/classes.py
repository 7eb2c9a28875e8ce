"""Channels that belong together: a union-find over labels, some of which have to stay."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NONE = 0
"""The label of what is no channel."""
_FIRST = 1024


class Classes:
    """Labels, int64 and from 1 on, in classes that grow together. A class that is frozen has to stay; `why` says
    for its label what first asked for that."""

    def __init__(self) -> None:
        self._parent: NDArray[np.int64] = np.arange(_FIRST, dtype=np.int64)
        self._frozen = np.zeros(_FIRST, dtype=bool)
        self._count = 1
        self.why: dict[int, str] = {}

    def __len__(self) -> int:
        """One more than the last label."""
        return self._count

    def new(self, count: int) -> Tensor:
        """Labels in a row, each a class of its own."""
        first, self._count = self._count, self._count + count
        while self._count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), 2 * len(self._parent))])
            self._frozen = np.concatenate([self._frozen, np.zeros_like(self._frozen)])
        return torch.arange(first, self._count)

    def roots(self, labels: Tensor) -> Tensor:
        """The label that stands for the class of each, in the labels' shape."""
        at = labels.numpy()
        found = self._parent[at]
        while not np.array_equal(found, at):
            at, found = found, self._parent[found]
        return torch.from_numpy(found)

    def unite(self, left: Tensor, right: Tensor) -> bool:
        """Makes one class of those of each pair, in which NONE unites nothing; whether any were not one before."""
        both = (left != NONE) & (right != NONE)
        a, b = self.roots(left[both]).numpy(), self.roots(right[both]).numpy()
        apart = a != b
        pairs = np.unique(a[apart] * self._count + b[apart])
        for one, other in zip((pairs // self._count).tolist(), (pairs % self._count).tolist(), strict=True):
            low, high = sorted((self._root(one), self._root(other)))
            self._parent[high] = low
            if self._frozen[high]:
                self._freeze(low, self.why[high])
        return len(pairs) > 0

    def freeze(self, labels: Tensor, why: str) -> None:
        """Keeps the classes of these labels whole."""
        for root in self.roots(labels).unique().tolist():
            if root != NONE:
                self._freeze(root, why)

    def frozen(self, labels: Tensor) -> Tensor:
        """Whether each label's class has to stay; NONE does not."""
        return torch.from_numpy(self._frozen[self.roots(labels).numpy()])

    def reason(self, label: int) -> str:
        """Why the label's class has to stay."""
        return self.why[self._root(label)]

    def _freeze(self, root: int, why: str) -> None:
        if not self._frozen[root]:
            self._frozen[root] = True
            self.why[root] = why

    def _root(self, label: int) -> int:
        while self._parent[label] != label:
            label = int(self._parent[label])
        return label
