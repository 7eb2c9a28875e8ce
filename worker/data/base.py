"""What a dataset is inside the worker: named splits that give raw samples by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from PIL.Image import Image
from torch import Tensor

from app.contract.facts import DatasetFacts

RawInputs: TypeAlias = dict[str, Tensor] | list[Image] | list[str]


@dataclass(frozen=True)
class RawBatch:
    """Samples as they are stored: arrays by input name, or decoded images, or strings; targets int64 [batch] or None.

    Targets of named labels are indices into `DatasetFacts.labels`, not yet the model's classes.
    """

    inputs: RawInputs
    targets: Tensor | None


class Split(Protocol):
    """One split. `read` must cost memory in proportion to the batch, not to the split."""

    @property
    def has_targets(self) -> bool: ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> RawBatch: ...


@dataclass(frozen=True)
class Data:
    """An opened dataset."""

    facts: DatasetFacts
    splits: dict[str, Split]
