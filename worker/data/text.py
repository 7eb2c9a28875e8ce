"""Text: JSON Lines or CSV with `text` and `label`, as one file or as a zip with a file a split."""

from __future__ import annotations

import codecs
import csv
import json
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from app.contract.errors import DatasetRejected
from app.contract.facts import SPLITS, DatasetFacts, SplitFacts, TensorFacts
from worker.data.base import Data, RawBatch, Split
from worker.vetting.archive import Archive

INPUT = "text"
EXPECTED = (
    'Expected are rows with `text` and `label`: JSON Lines ({"text": "…", "label": 1}) or CSV with a header; a zip '
    "holds one file a split (train.jsonl, test.csv, …), a single file may have a `split` field."
)
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
MAX_LINE_BYTES = 16 << 20
MAX_LABELS = 65_536

Label = int | str


@dataclass(frozen=True)
class Row:
    """One sample and where it stood, for sentences about it."""

    text: str
    label: Label | None
    split: str
    place: str


@dataclass
class TextSplit:
    """A split whose texts lie in one file, found by offset; memory is 16 bytes a sample."""

    path: Path
    starts: array[int] = field(default_factory=lambda: array("Q"))
    ends: array[int] = field(default_factory=lambda: array("Q"))
    targets: array[int] = field(default_factory=lambda: array("q"))

    @property
    def has_targets(self) -> bool:
        return len(self.targets) > 0

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, indices: Sequence[int]) -> RawBatch:
        with self.path.open("rb") as stream:
            texts = [self._text(stream, index) for index in indices]
        targets = torch.tensor([self.targets[index] for index in indices]) if self.has_targets else None
        return RawBatch(texts, targets)

    def _text(self, stream: IO[bytes], index: int) -> str:
        stream.seek(self.starts[index])
        return stream.read(self.ends[index] - self.starts[index]).decode()


def open_text(path: Path, filename: str, scratch: Path) -> Data:
    """One JSON Lines or CSV file; rows without a `split` are of the split train. Raises DatasetRejected."""
    with path.open("rb") as stream:
        return _collect(_rows(stream, filename, "train"), scratch)


def open_text_archive(archive: Archive, scratch: Path) -> Data:
    """An archive with `<split>.jsonl` or `<split>.csv`. Raises DatasetRejected."""
    return _collect(_archive_rows(archive), scratch)


def _archive_rows(archive: Archive) -> Iterator[Row]:
    for name, member in archive.members.items():
        if not name.endswith(SUFFIXES):
            continue
        split = Path(name).stem
        if split not in SPLITS:
            raise DatasetRejected(f"The archive holds {name!r}. {EXPECTED}")
        with member.open() as stream:
            yield from _rows(stream, name, split)


def _rows(stream: IO[bytes], name: str, split: str) -> Iterator[Row]:
    lines = _lines(stream, name)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        raise DatasetRejected(f"{name!r} has no rows. {EXPECTED}")
    again = _chain(first, lines)
    if first[1].lstrip().startswith(("{", "[")):
        return _json_rows(again, name, split)
    return _csv_rows(again, name, split)


def _chain(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _lines(stream: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """Decoded lines with their numbers from 1."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DatasetRejected(f"{name!r}, line {number} has more than {MAX_LINE_BYTES} bytes.")
        try:
            yield number, line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
        except UnicodeDecodeError as failure:
            raise DatasetRejected(f"{name!r}, line {number} is not UTF-8: save the dataset as UTF-8 text.") from failure


def _json_rows(lines: Iterator[tuple[int, str]], name: str, split: str) -> Iterator[Row]:
    for number, line in lines:
        place = f"{name!r}, line {number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as failure:
            raise DatasetRejected(f"{place} is no JSON. {EXPECTED}") from failure
        if not isinstance(value, dict):
            raise DatasetRejected(f"{place} is no JSON object. {EXPECTED}")
        yield _row(value, split, place)


def _csv_rows(lines: Iterator[tuple[int, str]], name: str, split: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)  # the module's own limit, 128 kB, is below the length of some documents
    reader = csv.reader((line for _, line in lines), strict=True)
    try:
        header = next(reader)
        if "text" not in header or len(set(header)) != len(header):
            raise DatasetRejected(f"{name!r}, line 1 is no header with a column `text`. {EXPECTED}")
        for cells in reader:
            if not cells:
                continue
            place = f"{name!r}, line {reader.line_num}"
            if len(cells) != len(header):
                raise DatasetRejected(f"{place} has {len(cells)} cells and the header {len(header)}: quote commas.")
            yield _row(dict(zip(header, cells, strict=True)), split, place, textual=True)
    except csv.Error as failure:
        raise DatasetRejected(f"{name!r}, line {reader.line_num} is no CSV ({failure}).") from failure


def _row(value: dict[str, Any], split: str, place: str, *, textual: bool = False) -> Row:
    """A row of `text`, `label` and `split`; in CSV, where everything is text, numbers become numbers."""
    text, label, own = value.get("text"), value.get("label"), value.get("split", split)
    if not isinstance(text, str):
        raise DatasetRejected(f"{place} has no string `text`. {EXPECTED}")
    if label is not None and (isinstance(label, bool) or not isinstance(label, int | str)):
        raise DatasetRejected(f"{place} has the label {str(label)[:80]!r}; a label is a whole number or a string.")
    if own not in SPLITS:
        raise DatasetRejected(f"{place} has the split {str(own)[:80]!r}; splits are {', '.join(SPLITS)}.")
    if isinstance(label, int) and not -(1 << 31) <= label < 1 << 31:
        raise DatasetRejected(f"{place} has the label {str(label)[:30]}; class numbers start at 0.")
    return Row(text, (label or None) if textual else label, own, place)


def _collect(rows: Iterator[Row], scratch: Path) -> Data:
    """Writes the texts to one file under `scratch` and keeps their offsets; labels become numbers."""
    path = Path(tempfile.mkdtemp(prefix="text-", dir=scratch)) / "texts"
    splits: dict[str, TextSplit] = {}
    numbers: dict[Label, int] = {}
    with path.open("xb") as stream:
        for row in rows:
            split = splits.setdefault(row.split, TextSplit(path))
            _add_label(split, numbers, row)
            split.starts.append(stream.tell())
            stream.write(row.text.encode("utf-8", "replace"))  # a lone surrogate of a JSON escape has no UTF-8
            split.ends.append(stream.tell())
    if not splits:
        raise DatasetRejected(f"The dataset has no rows. {EXPECTED}")
    labels = _number_labels(splits, numbers)
    facts = {name: _facts(splits[name]) for name in SPLITS if name in splits}
    opened: dict[str, Split] = {name: splits[name] for name in facts}
    return Data(DatasetFacts(kind="text", splits=facts, labels=labels), opened)


def _add_label(split: TextSplit, numbers: dict[Label, int], row: Row) -> None:
    """Notes the label in order of appearance. A split is labelled throughout or not at all."""
    if (row.label is not None) != split.has_targets and len(split):
        raise DatasetRejected(
            f"{row.place} {'lacks' if row.label is None else 'has'} a label, unlike the rows of its split before it. "
            "Label every row of a split or none."
        )
    if row.label is None:
        return
    split.targets.append(numbers.setdefault(row.label, len(numbers)))
    if len(numbers) > MAX_LABELS:
        raise DatasetRejected(f"{row.place}: more than {MAX_LABELS} different labels.")


def _number_labels(splits: dict[str, TextSplit], numbers: dict[Label, int]) -> tuple[str, ...] | None:
    """Replaces order of appearance: whole numbers are class numbers themselves, strings count in sorted order."""
    if not numbers:
        return None
    names = None
    if all(_is_number(label) for label in numbers):
        final = {number: int(label) for label, number in numbers.items()}
    elif any(isinstance(label, int) for label in numbers):
        raise DatasetRejected("Some labels are strings and some are numbers: use one kind.")
    else:
        names = tuple(sorted(map(str, numbers)))
        places = {name: place for place, name in enumerate(names)}
        final = {number: places[str(label)] for label, number in numbers.items()}
    for split in splits.values():
        split.targets = array("q", (final[number] for number in split.targets))
    return names


def _is_number(label: Label) -> bool:
    return isinstance(label, int) or (label.isascii() and label.isdecimal() and len(label) < 10)


def _facts(split: TextSplit) -> SplitFacts:
    return SplitFacts(
        samples=len(split),
        inputs=(TensorFacts(name=INPUT, shape=(), dtype="string"),),
        targets="classes" if split.has_targets else None,
        target_min=min(split.targets, default=None),
        target_max=max(split.targets, default=None),
    )
