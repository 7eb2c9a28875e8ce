"""A Parquet file's footer and pages, checked before a library reads them: a page says itself how large it will become.

A few hundred bytes can claim pages of 2 GiB, or one row with a hundred million words: Arrow believes them. And Arrow
ends the process where a footer's description of a column contradicts itself and is asked for from Python. So the
columns that are to be read are found and walked here, from page header to page header, without unpacking any.

Source: Apache Parquet, "File Format" and parquet.thrift (FileMetaData, PageHeader).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from app.contract.errors import TersorError
from worker.vetting.thrift import CutShort, Malformed, Wanted, read_struct

MAGIC = b"PAR1"
TAIL = 8  # the footer's length and the magic
MAX_FOOTER_BYTES = 16 << 20  # a million pictures in groups of a hundred need 6 MB
MAX_PAGE_BYTES = 256 << 20  # unpacked; writers aim at 1 MB, but a page holds at least one whole picture
MAX_NESTED_VALUES = 1 << 25  # words of a row group: all of them may be one row's, which is read at once
MAX_HEADER_BYTES = 1 << 20  # of a page; its statistics hold the smallest and largest value
FIRST_READ = 4096  # holds most headers

_COLUMN: Wanted = {5: "number", 7: "number", 9: "number", 11: "number"}  # values, bytes, where data and dictionary are
_FOOTER: Wanted = {4: [{1: [{1: "bytes", 3: _COLUMN}], 3: "number"}]}  # row groups of columns, and of how many rows
_PAGE: Wanted = {
    1: "number",  # type
    2: "number",  # bytes unpacked
    3: "number",  # bytes packed
    5: {1: "number", 2: "number"},  # data page: values, encoding
    7: {1: "number"},  # dictionary: values
    8: {1: "number", 4: "number"},  # data page of version 2: values, encoding
}
_DICTIONARY = 2  # the type of its page
_DATA = {0: (5, 2), 3: (8, 4)}  # of data pages by type: the field of their own header, and there that of the encoding
_DELTA_BYTE_ARRAY = 7  # an encoding in which a value can be much longer than its share of the page


@dataclass(frozen=True)
class Chunk:
    """One column of one row group: its bytes [start, start + size), its values, the rows of its group."""

    start: int
    size: int
    values: int
    rows: int


@dataclass(frozen=True)
class Footer:
    """Where the footer starts, and the chunks of every row group in the order of the schema's leaves."""

    start: int
    groups: tuple[tuple[Chunk, ...], ...]


class _Fault(Exception):
    """What is wrong with a page, as the end of a sentence about it."""


def read_footer(path: Path, name: str, error: type[TersorError]) -> Footer:
    """Raises `error` where the file does not end as Parquet does, or the footer is huge, damaged or of other files."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(len(MAGIC))
        stream.seek(max(0, size - TAIL))
        tail = stream.read(TAIL)
        if size < len(MAGIC) + TAIL or head != MAGIC or tail[4:] != MAGIC:
            raise error(
                f"{name!r} is no whole Parquet file: it was cut short, is damaged or encrypted. Upload it again."
            )
        (length,) = struct.unpack("<I", tail[:4])
        if length > min(MAX_FOOTER_BYTES, size - TAIL - len(MAGIC)):
            raise error(
                f"{name!r} claims a footer of {length} bytes; the file has {size} and at most {MAX_FOOTER_BYTES} are "
                "taken. It is damaged, or its row groups are too many: write fewer."
            )
        start = size - TAIL - length
        stream.seek(start)
        data = stream.read(length)
    try:
        fields, _ = read_struct(data, _FOOTER)
    except Malformed as failure:
        raise error(f"{name!r} is damaged: its footer cannot be read ({failure}). Upload it again.") from failure
    return Footer(start, tuple(_group(group, name, error) for group in fields.get(4, [])))


def _group(group: dict[int, Any], name: str, error: type[TersorError]) -> tuple[Chunk, ...]:
    return tuple(_chunk(column, group.get(3), name, error) for column in group.get(1, []))


def _chunk(column: dict[int, Any], rows: int | None, name: str, error: type[TersorError]) -> Chunk:
    about = column.get(3, {})
    if rows is None or not {5, 7, 9} <= about.keys():
        raise error(f"{name!r} is damaged: its footer leaves a column undescribed.")
    if column.get(1):
        raise error(f"{name!r} refers to columns in another file, which is never opened. Write one whole file.")
    data, dictionary = about[9], about.get(11, 0)
    return Chunk(dictionary if 0 < dictionary < data else data, about[7], about[5], rows)


def largest_page(
    path: Path, name: str, chunks: Iterable[Chunk], end: int, error: type[TersorError], *, nested: bool
) -> int:
    """Bytes of the largest page of these chunks once unpacked. `nested` columns have several values a row.

    Raises `error` where a page or a row group is larger than the caps, or the pages contradict the footer. `end` is
    where the footer starts.
    """
    largest = 0
    with path.open("rb") as stream:
        for chunk in chunks:
            if not nested and chunk.values != chunk.rows:
                raise error(f"{name!r} is damaged: a column has {chunk.values} of {chunk.rows} values.")
            if not chunk.values:
                continue
            if chunk.start < len(MAGIC) or chunk.size < 0 or chunk.start + chunk.size > end:
                raise error(f"{name!r} is damaged: a column lies outside of the file.")
            if nested and chunk.values > MAX_NESTED_VALUES:
                raise error(
                    f"{name!r} has a row group with {chunk.values} values in a column of lists; at most "
                    f"{MAX_NESTED_VALUES} are taken. Write it with smaller row groups."
                )
            try:
                largest = max(largest, _walk(stream, chunk, nested))
            except _Fault as fault:
                raise error(f"{name!r} cannot be read: a page {fault}.") from fault
    return largest


def _walk(stream: IO[bytes], chunk: Chunk, nested: bool) -> int:
    """From page to page as a reader goes, until the values are complete; the largest page."""
    largest, seen, at = 0, 0, chunk.start
    end = chunk.start + chunk.size
    while seen < chunk.values:
        header, length = _header(stream, at, end)
        unpacked, packed = _size(header, 2), _size(header, 3)
        if unpacked > MAX_PAGE_BYTES:
            raise _Fault(f"unpacks to {unpacked} bytes; at most {MAX_PAGE_BYTES} are taken. Write smaller pages")
        at += length + packed
        if at > end:
            raise _Fault("reaches beyond its column: the file is damaged")
        seen += _count(header, unpacked, nested)
        largest = max(largest, unpacked)
    if seen != chunk.values:
        raise _Fault(f"is one too many: they hold {seen} values, the footer says {chunk.values}")
    return largest


def _header(stream: IO[bytes], at: int, end: int) -> tuple[dict[int, Any], int]:
    for limit in (FIRST_READ, MAX_HEADER_BYTES):
        stream.seek(at)
        try:
            return read_struct(stream.read(min(limit, end - at)), _PAGE)
        except CutShort:
            continue
        except Malformed as failure:
            raise _Fault(f"has a damaged header ({failure})") from failure
    raise _Fault("has a header that is too long or cut short: the file is damaged")


def _size(header: dict[int, Any], field: int) -> int:
    value: int = header.get(field, -1)
    if value < 0:
        raise _Fault("has a header without sizes: the file is damaged")
    return value


def _count(header: dict[int, Any], unpacked: int, nested: bool) -> int:
    """Values of a data page. A dictionary has none, but no more entries than bytes."""
    kind = header.get(1, -1)
    if kind == _DICTIONARY:
        if _size(header.get(7, {}), 1) > unpacked:
            raise _Fault("has an impossible dictionary: the file is damaged")
        return 0
    if kind not in _DATA:
        raise _Fault("is of an unknown kind: the file is damaged")
    field, encoding = _DATA[kind]
    own = header.get(field, {})
    if nested and own.get(encoding) == _DELTA_BYTE_ARRAY:
        raise _Fault("is delta-encoded, which lists of words may not be: write it with plain or dictionary encoding")
    return _size(own, 1)
