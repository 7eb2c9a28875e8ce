"""What a dataset is inside the worker: named splits that give raw samples by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from app.contract.facts import DatasetFacts


@dataclass(frozen=True)
class Sound:
    """One channel of sound: float32 [samples], and how many of them make a second.

    Integers of a file are scaled to [-1, 1]; a file of floats may reach beyond.
    """

    samples: Tensor
    rate: int


RawInputs: TypeAlias = dict[str, Tensor] | list[Image] | list[str] | list[Sound] | list[list[str]]
RawTargets: TypeAlias = Tensor | list[str] | list[Tensor]


@dataclass(frozen=True)
class RawBatch:
    """Samples as they are stored: arrays by input name, decoded images, strings, sounds, or lists of words.

    Targets are int64 [batch] (classes), float32 [batch, ...] (values), strings (transcripts), or an int64 tensor a
    sample (tags, one a word); None where the split has none. Targets of named labels are indices into
    `DatasetFacts.labels`, not yet the model's classes.
    """

    inputs: RawInputs
    targets: RawTargets | None


class Split(Protocol):
    """One split. `read` must cost memory in proportion to the batch, not to the split."""

    @property
    def has_targets(self) -> bool: ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> RawBatch: ...

    def classes(self) -> NDArray[np.int64] | None:
        """int64 [n]: the class of every sample where targets are classes, else None. Costs 8 bytes a sample."""


@dataclass(frozen=True)
class Data:
    """An opened dataset."""

    facts: DatasetFacts
    splits: dict[str, Split]
