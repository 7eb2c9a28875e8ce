"""From samples, as a reader finds them one after the other, to a dataset: the one way for everything but arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from app.contract.errors import DatasetRejected
from app.contract.facts import SPLITS, DataKind, DatasetFacts, SplitFacts
from worker.data.base import Data, RawBatch, RawInputs, Split
from worker.data.contents import Content, Contents, contents_of
from worker.data.spool import Spool
from worker.data.targets import Labels, Target, Targets
from worker.vetting.archive import Member
from worker.vetting.section import Section


class Sample(NamedTuple):
    """One sample: its content, its target, its split, and where it stood, for sentences about it."""

    kind: DataKind
    content: Content | bytes
    target: Target | None
    split: str
    place: str


@dataclass(frozen=True)
class StoredSplit:
    """A split whose samples lie on disk; `read` decodes those of one batch."""

    contents: Contents
    targets: Targets

    @property
    def has_targets(self) -> bool:
        return self.targets.kind is not None

    def __len__(self) -> int:
        return len(self.contents)

    def read(self, indices: Sequence[int]) -> RawBatch:
        inputs = cast(RawInputs, [self.contents[index] for index in indices])
        return RawBatch(inputs, self.targets.take(indices) if self.has_targets else None)

    def classes(self) -> NDArray[np.int64] | None:
        return self.targets.classes()


class Collector:
    """Takes samples and makes the dataset of them. Every method raises DatasetRejected, naming the sample."""

    def __init__(self, scratch: Path, labels: Labels | None = None) -> None:
        self._spool = Spool(scratch, "data")
        self._labels = labels or Labels()
        self._makers = contents_of(self._spool)
        self._kind: DataKind | None = None
        self._splits: dict[str, StoredSplit] = {}

    def add(self, sample: Sample) -> None:
        """Adds one sample; bytes are stored, members stay where they lie."""
        if self._kind not in (None, sample.kind):
            raise DatasetRejected(
                f"{sample.place} is {sample.kind}, and what came before is {self._kind}: a dataset holds one kind."
            )
        self._kind = sample.kind
        split = self._splits.get(sample.split)
        if split is None:
            split = StoredSplit(self._makers[sample.kind](), Targets(self._spool, self._labels))
            self._splits[sample.split] = split
        split.targets.append(sample.target, sample.place)
        content = sample.content
        split.contents.append(self._stored(content, sample.place) if isinstance(content, bytes) else content)

    def finish(self, nothing: str) -> Data:
        """The dataset; `nothing` is what to say where no sample came."""
        if self._kind is None:
            raise DatasetRejected(nothing)
        self._spool.flush()
        names, classes = self._labels.final()
        for split in self._splits.values():
            split.targets.finish(classes)
        self._check_kinds()
        ordered = {name: self._splits[name] for name in SPLITS if name in self._splits}
        facts = {name: _facts(split) for name, split in ordered.items()}
        opened: dict[str, Split] = {**ordered}
        return Data(DatasetFacts(kind=self._kind, splits=facts, labels=names), opened)

    def _stored(self, content: bytes, place: str) -> Member:
        section = Section(self._spool.path, self._spool.write(content), len(content))
        self._spool.flush()
        return Member(place, len(content), section.open, section)

    def _check_kinds(self) -> None:
        kinds = {split.targets.kind: name for name, split in self._splits.items() if split.has_targets}
        if len(kinds) > 1:
            found = " and ".join(f"{kind} ({name})" for kind, name in kinds.items())
            raise DatasetRejected(f"The splits have targets of different kinds: {found}. A dataset has one kind.")


def _facts(split: StoredSplit) -> SplitFacts:
    targets = split.targets
    low, high = targets.range or (None, None)
    return SplitFacts(
        samples=len(split),
        inputs=(split.contents.facts(),),
        targets=targets.kind,
        target_min=low,
        target_max=high,
        target_shape=targets.shape,
        binary=targets.kind == "values" and targets.binary,
    )
