"""A batch as a model takes it: encoded inputs, and what they are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

Inputs: TypeAlias = tuple[Tensor, ...]
"""The positional arguments of `Model.module`, in the order of `ModelFacts.inputs`; the first dimension is the batch."""

IGNORED = -100
"""The target of a position that does not count: padding, and parts of a word beyond its first."""


@dataclass(frozen=True)
class Share:
    """What the process `rank` of `size` takes of a batch: nearly as many samples as the others, and none of theirs."""

    rank: int
    size: int

    def of(self, samples: int) -> range:
        """The rows of a batch of so many."""
        return range(samples * self.rank // self.size, samples * (self.rank + 1) // self.size)

    def most(self, samples: int) -> int:
        """How many the process with most of them takes of so many, at least one."""
        return max(1, -(-samples // self.size))


@dataclass(frozen=True)
class Batch:
    """Inputs of the model, and targets on its scale: int64 classes [batch] or [batch, steps], or float32 values.

    Where samples are mixed, targets of one class a sample are float32 shares [batch, classes].

    Positions whose target is IGNORED do not count. `references` are the transcripts of speech, for its error rate.
    `indices` are the places of the samples in their split; who changes inputs at random sets them to None. `smoothing`
    is the share of each target that a loss spreads evenly over all classes (Szegedy et al. 2015).

    A process's share of a batch says how many samples the `whole` has. Where there are too few for all, it holds one
    that is another's, a `stand_in`, which does not count.
    """

    inputs: Inputs
    targets: Tensor | None
    references: list[str] | None = None
    indices: tuple[int, ...] | None = None
    smoothing: float = 0.0
    whole: int | None = None
    stand_in: bool = False

    def __len__(self) -> int:
        return len(self.inputs[0])

    def share(self, share: Share) -> Batch:
        """The samples that one process takes of it."""
        rows = share.of(len(self))
        return replace(self.part(rows or [0]), whole=len(self), stand_in=not rows)

    def part(self, rows: Sequence[int]) -> Batch:
        """These samples of it."""
        chosen = list(rows)
        return replace(
            self,
            inputs=tuple(tensor[chosen] for tensor in self.inputs),
            targets=None if self.targets is None else self.targets[chosen],
            references=None if self.references is None else [self.references[row] for row in chosen],
            indices=None if self.indices is None else tuple(self.indices[row] for row in chosen),
        )

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            inputs=tuple(tensor.to(device) for tensor in self.inputs),
            targets=None if self.targets is None else self.targets.to(device),
        )
