"""Text files: JSON Lines, CSV or plain text, as one file or as an archive with a file a split."""

from __future__ import annotations

import codecs
import csv
import functools
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from app.contract.errors import DatasetRejected
from worker.data.base import Data
from worker.data.collect import Collector, Sample
from worker.data.paragraphs import paragraphs
from worker.data.rows import EXPECTED, row_sample
from worker.data.splits import DEFAULT, SplitNames, split_of_file
from worker.vetting.archive import Archive, Member

ROWS = (".jsonl", ".ndjson", ".json", ".csv")
PLAIN = (".txt", ".text")
MAX_LINE_BYTES = 16 << 20
HEAD = 64 << 10  # of a plain text, in which a first line of rows would end
_BUFFER_BYTES = 1 << 20


def open_text(path: Path, filename: str, scratch: Path) -> Data:
    """One file; what names no split is of the split that the file's name begins with, else of train.

    Raises DatasetRejected.
    """
    collector = Collector(scratch)
    _collect(collector, lambda: path.open("rb"), filename, split_of_file(filename) or DEFAULT)
    return collector.finish(f"{filename!r} has no rows. {EXPECTED}")


def open_text_archive(archive: Archive, scratch: Path) -> Data:
    """An archive with `<split>.jsonl`, `<split>.csv` or `<split>.txt`. Raises DatasetRejected."""
    collector, splits = Collector(scratch), SplitNames()
    for name, member in text_members(archive.members).items():
        split = splits.of_file(name)
        if split is None:
            raise DatasetRejected(f"The archive holds {name!r}. {EXPECTED}")
        _collect(collector, functools.partial(buffered, member), name, split)
    return collector.finish(f"The dataset has no rows. {EXPECTED}")


def buffered(member: Member) -> IO[bytes]:
    """A member's bytes; without a buffer of its own, a line of a zip's member is read byte by byte."""
    return cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, member.open()), _BUFFER_BYTES))


def text_members(members: dict[str, Member]) -> dict[str, Member]:
    """The rows of an archive at its top; plain text only where a file carries a split's name: the rest are readmes."""
    top = {name: member for name, member in members.items() if "/" not in name}
    rows = {name: member for name, member in top.items() if name.endswith(ROWS)}
    return rows or {name: member for name, member in top.items() if name.endswith(PLAIN) and split_of_file(name)}


def _collect(collector: Collector, opened: Callable[[], IO[bytes]], name: str, split: str) -> None:
    """Adds a file's samples. Only a file that is called plain text is read as such, and only if it holds no rows."""
    if name.endswith(PLAIN) and not _holds_rows(opened):
        for sample in paragraphs(opened, name, split):
            collector.add(sample)
        return
    with opened() as stream:
        for sample in _rows(stream, name, split):
            collector.add(sample)


def _holds_rows(opened: Callable[[], IO[bytes]]) -> bool:
    """Whether the first line is a JSON object or a CSV header with a column `text`."""
    with opened() as stream:
        line = stream.read(HEAD).lstrip().partition(b"\n")[0].decode("utf-8-sig", "replace")
    names = line.strip().split(",")
    if len(names) > 1 and "text" in names:
        return True
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _rows(stream: IO[bytes], name: str, split: str) -> Iterator[Sample]:
    lines = numbered(stream, name)
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


def numbered(stream: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
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


def _json_rows(lines: Iterator[tuple[int, str]], name: str, split: str) -> Iterator[Sample]:
    for number, line in lines:
        if line.strip():
            place = f"{name!r}, line {number}"
            yield row_sample(parse_object(line, place), split, place)


def parse_object(line: str | bytes, place: str, expected: str = EXPECTED) -> dict[str, Any]:
    """One JSON object. Raises DatasetRejected by its place."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as failure:
        raise DatasetRejected(f"{place} is no JSON. {expected}") from failure
    if not isinstance(value, dict):
        raise DatasetRejected(f"{place} is no JSON object. {expected}")
    return value


def _csv_rows(lines: Iterator[tuple[int, str]], name: str, split: str) -> Iterator[Sample]:
    for row, place in csv_rows(lines, name, "text", EXPECTED):
        yield row_sample(row, split, place, textual=True)


def csv_rows(
    lines: Iterator[tuple[int, str]], name: str, needed: str, expected: str
) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a CSV file with a header, and where each stood. Raises DatasetRejected."""
    csv.field_size_limit(MAX_LINE_BYTES)  # the module's own limit, 128 kB, is below the length of some documents
    reader = csv.reader((line for _, line in lines), strict=True)
    try:
        header = next(reader, [])
        if needed not in header or len(set(header)) != len(header):
            raise DatasetRejected(f"{name!r}, line 1 is no header with a column `{needed}`. {expected}")
        for cells in reader:
            if not cells:
                continue
            place = f"{name!r}, line {reader.line_num}"
            if len(cells) != len(header):
                raise DatasetRejected(f"{place} has {len(cells)} cells and the header {len(header)}: quote commas.")
            yield dict(zip(header, cells, strict=True)), place
    except csv.Error as failure:
        raise DatasetRejected(f"{name!r}, line {reader.line_num} is no CSV ({failure}).") from failure
