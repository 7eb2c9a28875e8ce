"""What samples are to be answered with: class numbers, values, transcripts or tags, in a few bytes of memory each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from app.contract.errors import DatasetRejected
from app.contract.facts import TargetKind
from worker.data.base import RawTargets
from worker.data.batch import IGNORED
from worker.data.spool import Records, Spool

MAX_LABELS = 65_536
MAX_VALUES = 65_536  # of one sample: outputs of a model
LABELLED = "Label every row of a split or none."

Label: TypeAlias = int | str


class Target(NamedTuple):
    """One sample's target: a label, a list of numbers, a string or a list of labels, by kind.

    `scalar` values are single numbers, whose shape is () and not (1,).
    """

    kind: TargetKind
    value: Any
    scalar: bool = False


class Labels:
    """The names of classes, numbered in the order in which they come; in the end whole numbers stand for themselves."""

    def __init__(self, *, names: bool = False) -> None:
        self._numbers: dict[Label, int] = {}
        self._names = names

    def number(self, label: Label, place: str) -> int:
        """The number of a label for the time being."""
        number = self._numbers.setdefault(label, len(self._numbers))
        if number >= MAX_LABELS:
            raise DatasetRejected(f"{place}: more than {MAX_LABELS} different labels.")
        return number

    def final(self) -> tuple[tuple[str, ...] | None, NDArray[np.int64]]:
        """The names in class order, or None where labels are class numbers; and the class of each number given out."""
        if self._names or not all(map(_is_number, self._numbers)):
            if any(isinstance(label, int) for label in self._numbers):
                raise DatasetRejected("Some labels are strings and some are numbers: use one kind.")
            names = _in_order(map(str, self._numbers))
            places = {name: place for place, name in enumerate(names)}
            return names or None, np.array([places[str(label)] for label in self._numbers], np.int64)
        return None, np.array([int(label) for label in self._numbers], np.int64)


class FixedLabels(Labels):
    """Labels whose names and numbers the file itself lists; -1 is its word for a sample without label."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self._fixed = names
        self._places = {name: place for place, name in enumerate(names)}

    def number(self, label: Label, place: str) -> int:
        number = self._places.get(label, -1) if isinstance(label, str) else label
        if not 0 <= number < len(self._fixed):
            raise DatasetRejected(
                f"{place} has the label {str(label)[:80]!r}; the file has {len(self._fixed)} classes."
            )
        return number

    def final(self) -> tuple[tuple[str, ...] | None, NDArray[np.int64]]:
        return self._fixed, np.arange(len(self._fixed))


def _is_number(label: Label) -> bool:
    return isinstance(label, int) or (label.isascii() and label.isdecimal() and len(label) < 10)


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Numerically where all are numbers, so that class 10 follows class 9."""
    distinct = sorted(set(names))
    return tuple(sorted(distinct, key=int) if all(map(_is_number, distinct)) else distinct)


class Targets:
    """The targets of one split: all samples have one of the same kind, or none has."""

    def __init__(self, spool: Spool, labels: Labels) -> None:
        self.kind: TargetKind | None = None
        self.shape: tuple[int, ...] | None = None
        self.binary = True
        self._labels = labels
        self._count = 0
        self._numbers: array[int] = array("q")
        self._records = Records(spool)
        self._used: set[int] = set()
        self._classes: NDArray[np.int64] = np.zeros(0, np.int64)

    def append(self, target: Target | None, place: str) -> None:
        """Adds one sample's target; raises DatasetRejected where it is unlike those before it."""
        kind = None if target is None else target.kind
        if self._count and kind != self.kind:
            raise DatasetRejected(_unlike(kind, self.kind, place))
        self.kind = kind
        self._count += 1
        if target is None:
            return
        if target.kind == "classes":
            number = self._labels.number(target.value, place)
            self._used.add(number)
            self._numbers.append(number)
        elif target.kind == "tags":
            self._add_tags(target.value, place)
        elif target.kind == "values":
            self._add_values(target, place)
        else:
            self._records.append(target.value.encode("utf-8", "replace"))

    def finish(self, classes: NDArray[np.int64]) -> None:
        """Takes note of the class of each label's number."""
        self._classes = classes
        if self.kind == "classes":
            self._numbers = array("q", (int(classes[number]) for number in self._numbers))

    @property
    def range(self) -> tuple[int, int] | None:
        """Smallest and largest class number of classes or tags."""
        used = [int(self._classes[number]) for number in self._used]
        return (min(used), max(used)) if used else None

    def classes(self) -> NDArray[np.int64] | None:
        """int64 [n], where targets are classes."""
        return np.frombuffer(self._numbers, np.int64) if self.kind == "classes" else None

    def take(self, indices: Sequence[int]) -> RawTargets:
        """Targets of a batch, as RawBatch describes them."""
        if self.kind == "classes":
            return torch.tensor([self._numbers[index] for index in indices])
        records = [self._records[index] for index in indices]
        if self.kind == "values":
            rows = np.frombuffer(b"".join(records), np.float32)
            return torch.from_numpy(rows.reshape(len(indices), *(self.shape or ())).copy())
        if self.kind == "tags":
            return [self._tags(record) for record in records]
        return [record.decode() for record in records]

    def _tags(self, record: bytes) -> torch.Tensor:
        numbers = np.frombuffer(record, np.int32).astype(np.int64)
        if not len(self._classes):
            return torch.from_numpy(numbers)
        return torch.from_numpy(np.where(numbers == IGNORED, IGNORED, self._classes[np.maximum(numbers, 0)]))

    def _add_tags(self, tags: Sequence[Label], place: str) -> None:
        numbers = [tag if tag == IGNORED else self._labels.number(tag, place) for tag in tags]
        self._used.update(number for number in numbers if number != IGNORED)
        self._records.append(np.array(numbers, np.int32).tobytes())

    def _add_values(self, target: Target, place: str) -> None:
        values = np.array([target.value] if target.scalar else target.value, np.float64)
        shape = () if target.scalar else (len(values),)
        if self.shape not in (None, shape):
            raise DatasetRejected(f"{place} has {len(values)} values, unlike the rows of its split before it.")
        if not (np.abs(values) <= np.finfo(np.float32).max).all():
            raise DatasetRejected(f"{place} holds NaN, infinity or what float32 cannot hold among its values.")
        self.shape = shape
        self.binary = self.binary and bool(np.isin(values, (0, 1)).all())
        self._records.append(values.astype(np.float32).tobytes())


def _unlike(kind: TargetKind | None, before: TargetKind | None, place: str) -> str:
    if kind is None or before is None:
        verb = "lacks" if kind is None else "has"
        return f"{place} {verb} a label, unlike the rows of its split before it. {LABELLED}"
    return f"{place} has {kind} as its target, unlike the rows of its split before it, which have {before}."
