"""Splits by name, and the seeded split that is made where a dataset comes as one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.contract.architecture import SplitSpec
from app.contract.errors import DatasetRejected
from app.contract.facts import SplitFacts, split_named
from worker.data.base import Data, RawBatch, Split

DEFAULT = "train"  # what carries no split's name
MIN_SAMPLES = 10  # below, a tenth is no sample
# train.jsonl, test-00000-of-00002.parquet, train_000017.tar
_FILE = re.compile(r"([a-z]+)(?:[-_]?\d[\w-]*)?")


def split_of_file(name: str) -> str | None:
    """The split that a file's name begins with, alone or with a shard's number, or None."""
    match = _FILE.fullmatch(_stem(name))
    return None if match is None else split_named(match[1])


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]


class SplitNames:
    """The splits of one dataset by the names that it gives them. Two names of one split most likely mean two."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def split(self, name: str) -> str | None:
        """The split that a folder of this name means, or None. Raises DatasetRejected for a second name of a split."""
        return self._noted(split_named(name), name)

    def of_file(self, name: str) -> str | None:
        """The same for a file or a shard."""
        return self._noted(split_of_file(name), _FILE.sub(r"\1", _stem(name)))

    def _noted(self, split: str | None, name: str) -> str | None:
        if split is not None and self._names.setdefault(split, name) != name:
            raise DatasetRejected(f"{self._names[split]!r} and {name!r} both mean the split {split!r}: leave one out.")
        return split


@dataclass(frozen=True)
class Part:
    """Some samples of a split, in an order of their own."""

    whole: Split
    rows: NDArray[np.int64]

    @property
    def has_targets(self) -> bool:
        return self.whole.has_targets

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> RawBatch:
        return self.whole.read(self.rows[np.asarray(indices, np.int64)].tolist())

    def classes(self) -> NDArray[np.int64] | None:
        classes = self.whole.classes()
        return None if classes is None else classes[self.rows]


def with_splits(data: Data, spec: SplitSpec) -> Data:
    """The dataset with validation and test cut from its train split, if that is its only one and large enough."""
    if set(data.splits) != {DEFAULT} or len(data.splits[DEFAULT]) < MIN_SAMPLES or not spec.held_out:
        return data
    whole = data.splits[DEFAULT]
    rows = divide(len(whole), whole.classes(), spec.validation, spec.test, spec.seed)
    parts = {name: Part(whole, own) for name, own in rows.items() if len(own)}
    facts = {name: _facts(data.facts.splits[DEFAULT], part) for name, part in parts.items()}
    return Data(data.facts.model_copy(update={"splits": facts, "split_seed": spec.seed}), {**parts})


def _facts(whole: SplitFacts, part: Part) -> SplitFacts:
    changes: dict[str, Any] = {"samples": len(part), "made_from": DEFAULT}
    classes = part.classes()
    if classes is not None:
        changes |= {"target_min": int(classes.min()), "target_max": int(classes.max())}
    return whole.model_copy(update=changes)


def divide(
    count: int, classes: NDArray[np.int64] | None, validation: float, test: float, seed: int
) -> dict[str, NDArray[np.int64]]:
    """Row numbers of train, validation and test, each ascending; together every row once.

    Rows are drawn at random by `seed` alone. With `classes` (int64 [count]) the split is stratified: of each class as
    large a share is held out as of the whole, up to one sample, and one sample of each class stays in train where there
    is room. It is systematic sampling of the rows ordered by class (Madow & Madow 1944).
    """
    # RandomState's numbers are frozen for good; those of newer generators may change with NumPy's version.
    random = np.random.RandomState(seed)
    order = random.permutation(count)
    kept = order[:0]
    if classes is not None:
        order = order[np.argsort(classes[order], kind="stable")]
        first = np.append(True, np.diff(classes[order]) != 0)
        kept, order = order[first], order[~first]
    sizes = _sizes(count, validation, test)
    if len(order) < sum(sizes):  # as many classes as samples: there is no keeping one of each
        kept, order = order[:0], np.append(kept, order)
    chosen = _every(order, sum(sizes), random)
    held, rest = order[chosen], order[~chosen]
    tested = _every(held, sizes[1], random)
    return {
        "train": np.sort(np.append(kept, rest)),
        "validation": np.sort(held[~tested]),
        "test": np.sort(held[tested]),
    }


def _sizes(count: int, *shares: float) -> list[int]:
    """At least one sample of every split that is asked for, and one for train."""
    sizes = [max(1, round(count * share)) if share else 0 for share in shares]
    while sum(sizes) >= count:
        sizes[sizes.index(max(sizes))] -= 1
    return sizes


def _every(rows: NDArray[np.int64], size: int, random: np.random.RandomState) -> NDArray[np.bool_]:
    """Marks exactly `size` rows at even distances from a random start: any run of m rows gives m * size / n or so."""
    if not len(rows):
        return np.zeros(0, np.bool_)
    at = np.arange(len(rows) + 1) + random.randint(len(rows))
    return np.diff(at * size // len(rows)) > 0
