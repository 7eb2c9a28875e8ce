"""Parquet: one file, or an archive with files a split; read once in small batches and spooled, as text files are.

A row group can hold a gigabyte, so reading rows of a shuffled order from it would unpack it again for every batch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
from pyarrow import parquet

from app.contract.errors import DatasetRejected
from app.contract.facts import DataKind
from worker.data.base import Data
from worker.data.collect import Collector, Sample
from worker.data.folders import TRANSCRIPTS
from worker.data.rows import MAX_LABEL, MAX_WORDS, row_sample, split_of_row, target_of
from worker.data.splits import DEFAULT, SplitNames, split_of_file
from worker.data.targets import FixedLabels, Labels
from worker.vetting.archive import Archive, Budget
from worker.vetting.boundary import OUR_TROUBLE, first_line
from worker.vetting.parquet import Footer, largest_page, read_footer

# Arrow's own allocator keeps what was freed, some 30 MB; the system's gives it back to what comes after.
pa.set_memory_pool(pa.system_memory_pool())

SUFFIX = ".parquet"
EXPECTED = (
    "Expected are the columns `text` and `label`, `tokens` and `tags`, `image` and `label`, or `audio` and `text` or "
    "`label`; pictures and sounds as bytes or as a struct of bytes and path. An archive holds one or more files a "
    "split (train.parquet, test-00000-of-00002.parquet)."
)
BATCH_BYTES = 16 << 20  # what a batch may unpack to: no value is longer than its page
MAX_BATCH_ROWS = 256
BUFFER_BYTES = 1 << 20  # of a column's stream; without one, a whole column of a row group is read at once
ROW_BYTES = 32  # charged besides the content: what a row costs in memory
ENTRY_BYTES = 8  # charged for each word, tag or value besides its letters: what it costs on disk
MAX_FEATURES_BYTES = 4 << 20  # of the JSON in which the Hub's files name their classes
UNLABELLED = -1  # in files that name their classes: a sample without label

# What is read beside the content, by the column that holds it. A text beside a picture is a caption.
_VALUES = ("label", "value", "values", "split")
_BESIDE: dict[str, tuple[str, ...]] = {
    "image": _VALUES,
    "audio": (*_VALUES, *TRANSCRIPTS),
    "text": _VALUES,
    "tokens": ("tags", "split"),
}
_MEDIA: dict[str, DataKind] = {"image": "images", "audio": "audio"}


@dataclass(frozen=True)
class Table:
    """An opened file: the column of its content, the columns read, its row groups, and rows read at a time."""

    file: parquet.ParquetFile
    name: str
    content: str
    columns: tuple[str, ...]
    groups: int
    rows_at_once: int
    class_names: tuple[str, ...] | None


def open_parquet(path: Path, filename: str, scratch: Path) -> Data:
    """One file; the split is its rows' `split`, else what its name begins with, else train. Raises DatasetRejected."""
    return _collect([(path, filename, split_of_file(filename) or DEFAULT)], scratch)


def open_parquet_archive(archive: Archive, scratch: Path) -> Data:
    """An archive with `<split>.parquet`, `<split>-00000-of-00002.parquet` or `<split>/….parquet`."""
    return _collect(_unpacked(archive, scratch), scratch)


def _unpacked(archive: Archive, scratch: Path) -> Iterator[tuple[Path, str, str]]:
    """Path, name and split of each file, of which one at a time lies unpacked."""
    splits, path = SplitNames(), Path(tempfile.mkdtemp(prefix="parquet-", dir=scratch)) / "unpacked"
    for name in sorted(name for name in archive.members if name.endswith(SUFFIX)):
        split = splits.of_file(name) or splits.split(name.rpartition("/")[0].rpartition("/")[2])
        if split is None:
            raise DatasetRejected(f"The archive holds {name!r}, whose name says no split. {EXPECTED}")
        archive.members[name].extract(path)
        yield path, name, split
        path.unlink()


def _collect(files: Iterable[tuple[Path, str, str]], scratch: Path) -> Data:
    collector: Collector | None = None
    class_names: tuple[str, ...] | None = None
    for path, name, split in files:
        table = _open(path, name)
        if collector is None:
            class_names = table.class_names
            collector = Collector(scratch, FixedLabels(class_names) if class_names else Labels())
        if table.class_names != class_names:
            raise DatasetRejected(f"{name!r} names other classes than the files before it.")
        budget = Budget(path.stat().st_size, DatasetRejected)
        for row, place in _rows(table):
            sample = _sample(row, table, split, place)
            budget.charge(_cost(sample))
            collector.add(sample)
    assert collector is not None  # an archive comes here because it holds a file
    return collector.finish(f"The Parquet files hold no rows. {EXPECTED}")


def _cost(sample: Sample) -> int:
    """Bytes that a sample takes here, or a little more."""
    content, target = sample.content, sample.target
    assert isinstance(content, str | bytes | list)
    cost = ROW_BYTES + (
        sum(map(len, content)) + ENTRY_BYTES * len(content) if isinstance(content, list) else len(content)
    )
    if target is not None and isinstance(target.value, list | str):
        cost += ENTRY_BYTES * len(target.value)
    return cost


def _open(path: Path, name: str) -> Table:
    """Checks all that Arrow is to read before it reads any page."""
    footer = read_footer(path, name, DatasetRejected)
    try:
        file = _reader(path)
        schema = file.schema_arrow
        content, columns = _columns(schema, name)
        leaves = _leaves(file, columns)
        largest = _largest_page(path, name, footer, leaves, len(file.schema))
        # A word that comes a million times is kept once where lists of words are read as dictionaries.
        nested = [leaf for leaf in leaves.values() if leaf.max_repetition_level]
        words = [leaf.path for leaf in nested if leaf.physical_type == "BYTE_ARRAY"]
        file = _reader(path, words)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as failure:
        _damaged(failure, name)
    rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // max(1, largest)))
    selected = tuple(leaf.path for leaf in leaves.values())
    return Table(file, name, content, selected, len(footer.groups), rows, _class_names(schema, columns))


def _largest_page(path: Path, name: str, footer: Footer, leaves: dict[int, Any], width: int) -> int:
    """Of the columns that are read. Raises DatasetRejected where any of them does not fit its own description."""
    if any(len(group) != width for group in footer.groups):
        raise DatasetRejected(f"{name!r} is damaged: a row group lacks columns.")
    largest = 0
    for index, leaf in leaves.items():
        chunks, nested = (group[index] for group in footer.groups), leaf.max_repetition_level > 0
        largest = max(largest, largest_page(path, name, chunks, footer.start, DatasetRejected, nested=nested))
    return largest


def _reader(path: Path, dictionaries: Sequence[str] = ()) -> parquet.ParquetFile:
    """Pages are read as they are needed: by default Arrow would read all columns of a row group ahead."""
    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES, read_dictionary=list(dictionaries))


def _columns(schema: pa.Schema, name: str) -> tuple[str, tuple[str, ...]]:
    """The column of the content, and every column that is read. Raises DatasetRejected where types do not fit."""
    content = next((column for column in _BESIDE if column in schema.names), None)
    if content is None:
        raise DatasetRejected(f"{name!r} has the columns {', '.join(schema.names)[:200]!r}. {EXPECTED}")
    columns = (content, *(column for column in _BESIDE[content] if column in schema.names))
    for column in columns:
        if schema.names.count(column) > 1:
            raise DatasetRejected(f"{name!r} has two columns {column!r}.")
        kind = schema.field(column).type
        if not _fits(column, kind):
            raise DatasetRejected(f"Column {column!r} of {name!r} holds {str(kind)[:80]}. {EXPECTED}")
    return content, columns


def _fits(column: str, kind: pa.DataType) -> bool:
    if column in _MEDIA:
        if pa.types.is_struct(kind):
            place = kind.get_field_index("bytes")
            return place >= 0 and _is_bytes(kind.field(place).type)
        return _is_bytes(kind)
    if column in ("tokens", "tags", "values"):
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            return False
        if column == "tokens":
            return _is_text(kind.value_type)
        return _is_number(kind.value_type) or (column == "tags" and _is_text(kind.value_type))
    if column == "value":
        return _is_number(kind)
    return _is_text(kind) or (column == "label" and pa.types.is_integer(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _leaves(file: parquet.ParquetFile, columns: tuple[str, ...]) -> dict[int, Any]:
    """Parquet's own columns of those that are read; of a struct the bytes alone."""
    found = {}
    for index in range(len(file.schema)):
        leaf = file.schema.column(index)
        column, _, inner = leaf.path.partition(".")
        if column in columns and (column not in _MEDIA or inner in ("", "bytes")):
            found[index] = leaf
    return found


def _rows(table: Table) -> Iterator[tuple[dict[str, Any], str]]:
    """Every row as a dictionary, and where it stood."""
    number = 0
    try:
        for batch in _batches(table):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            for row in range(batch.num_rows):
                number += 1
                place = f"{table.name}, row {number}"
                yield {name: _cell(column, row, place) for name, column in columns.items()}, place
    except (pa.ArrowException, OSError) as failure:
        _damaged(failure, table.name)


def _batches(table: Table) -> Iterator[pa.RecordBatch]:
    """Row group by row group: Arrow cannot join lists of two dictionaries, and each group has its own."""
    for group in range(table.groups):
        yield from table.file.iter_batches(
            table.rows_at_once, row_groups=[group], columns=list(table.columns), use_threads=False
        )


def _cell(column: pa.Array, row: int, place: str) -> Any:
    cell = column[row]
    if isinstance(cell, pa.ListScalar) and cell.values is not None and len(cell.values) > MAX_WORDS:
        raise DatasetRejected(f"{place} has a list of {len(cell.values)} entries; at most {MAX_WORDS} are taken.")
    try:
        return cell.as_py()
    except UnicodeDecodeError as failure:
        raise DatasetRejected(f"{place} is not UTF-8: save its text as UTF-8.") from failure


def _sample(row: dict[str, Any], table: Table, split: str, place: str) -> Sample:
    if table.class_names is not None and row.get("label") == UNLABELLED:
        row["label"] = None
    if table.content not in _MEDIA:
        return row_sample(row, split, place)
    content = row[table.content]
    data = content.get("bytes") if isinstance(content, dict) else content
    if data is None:
        raise DatasetRejected(f"{place} has no bytes in `{table.content}`: what a path points to is never opened.")
    kind = _MEDIA[table.content]
    target = target_of(row, place, transcripts=TRANSCRIPTS if kind == "audio" else ())
    return Sample(kind, data, target, split_of_row(row, split, place), place)


def _class_names(schema: pa.Schema, columns: tuple[str, ...]) -> tuple[str, ...] | None:
    """The names of the classes as `datasets` of Hugging Face writes them beside the schema, or None."""
    text = (schema.metadata or {}).get(b"huggingface", b"")
    column = next((column for column in ("label", "tags") if column in columns), None)
    if column is None or not 0 < len(text) <= MAX_FEATURES_BYTES or not _counts(schema.field(column).type):
        return None
    try:
        feature = json.loads(text)["info"]["features"][column]
        names = feature.get("feature", feature)["names"]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None  # a note of other tools, which may say what it likes
    usable = isinstance(names, list) and all(isinstance(name, str) and 0 < len(name) <= MAX_LABEL for name in names)
    return tuple(names) if usable and 0 < len(set(names)) == len(names) else None


def _counts(kind: pa.DataType) -> bool:
    """Whether labels are class numbers, which names may belong to."""
    return pa.types.is_integer(kind.value_type if pa.types.is_nested(kind) else kind)


def _damaged(failure: Exception, name: str) -> NoReturn:
    if isinstance(failure, MemoryError) or (isinstance(failure, OSError) and failure.errno in OUR_TROUBLE):
        raise failure
    raise DatasetRejected(f"{name!r} is damaged or no Parquet that is taken: {first_line(failure)}") from failure
