"""The pages of a Parquet file, checked before a library reads them: a page says itself how large it will become.

A few hundred bytes can claim pages of 2 GiB, or one row with a hundred million words: Arrow believes them. So the
columns that are to be read are walked here from page header to page header, without unpacking any.

Source: Apache Parquet, "File Format" and parquet.thrift (PageHeader).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from app.contract.errors import TersorError
from worker.vetting.thrift import CutShort, Malformed, Struct, read_struct

MAGIC = b"PAR1"
TAIL = 8  # the footer's length and the magic
MAX_FOOTER_BYTES = 64 << 20  # a thousand columns in a thousand row groups need about that much
MAX_PAGE_BYTES = 256 << 20  # unpacked; writers aim at 1 MB, but a page holds at least one whole picture
MAX_NESTED_VALUES = 1 << 25  # words of a row group: all of them may be one row's, which is read at once
MAX_HEADER_BYTES = 1 << 20  # of a page; its statistics hold the smallest and largest value
FIRST_READ = 4096  # holds most headers
_PAGE_TYPES = {0: 5, 3: 8}  # data pages (version 1, 2) and the field of their own header
_DICTIONARY_TYPE, _DICTIONARY_FIELD = 2, 7
_UNPACKED, _PACKED, _VALUES = 2, 3, 1
# Encodings of texts in which a value can be much longer than its share of the page.
_DELTA_BYTE_ARRAY = 7
_ENCODING_FIELDS = {0: 2, 3: 4}


@dataclass(frozen=True)
class Chunk:
    """One column of one row group, as the footer describes it."""

    column: str
    start: int
    size: int
    values: int
    rows: int
    nested: bool  # several values a row
    elsewhere: bool = False  # in another file


class _Fault(Exception):
    """What is wrong with a page, as the end of a sentence about it."""


def check_ends(path: Path, name: str, error: type[TersorError]) -> int:
    """Where the footer starts. Raises `error` where the file does not end as Parquet does, or the footer is huge."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(len(MAGIC))
        stream.seek(max(0, size - TAIL))
        tail = stream.read(TAIL)
    if size < len(MAGIC) + TAIL or head != MAGIC or tail[4:] != MAGIC:
        raise error(f"{name!r} is no whole Parquet file: it was cut short, is damaged or encrypted. Upload it again.")
    (length,) = struct.unpack("<I", tail[:4])
    if length > min(MAX_FOOTER_BYTES, size - TAIL - len(MAGIC)):
        raise error(
            f"{name!r} claims a footer of {length} bytes; the file has {size} and at most {MAX_FOOTER_BYTES} are taken."
        )
    return size - TAIL - length


def largest_page(path: Path, name: str, chunks: Iterable[Chunk], end: int, error: type[TersorError]) -> int:
    """Bytes of the largest page of these columns once unpacked. `end` is where the footer starts.

    Raises `error` where a page or a row group is larger than the caps, or the pages contradict the footer.
    """
    largest = 0
    with path.open("rb") as stream:
        for chunk in chunks:
            if not chunk.nested and chunk.values != chunk.rows:
                raise error(f"{name!r} is damaged: column {chunk.column!r} has {chunk.values} of {chunk.rows} values.")
            if not chunk.values:
                continue
            if chunk.elsewhere or chunk.start < len(MAGIC) or chunk.size < 0 or chunk.start + chunk.size > end:
                raise error(f"{name!r} is damaged: column {chunk.column!r} lies outside of the file.")
            if chunk.nested and chunk.values > MAX_NESTED_VALUES:
                raise error(
                    f"{name!r} has a row group with {chunk.values} values in column {chunk.column!r}; at most "
                    f"{MAX_NESTED_VALUES} are taken. Write it with smaller row groups."
                )
            try:
                largest = max(largest, _walk(stream, chunk))
            except _Fault as fault:
                raise error(f"{name!r} cannot be read: a page of column {chunk.column!r} {fault}.") from fault
    return largest


def _walk(stream: IO[bytes], chunk: Chunk) -> int:
    """From page to page as a reader goes, until the values are complete; the largest page."""
    largest, seen, at = 0, 0, chunk.start
    end = chunk.start + chunk.size
    while seen < chunk.values:
        header, length = _header(stream, at, end)
        unpacked, packed = _size(header, _UNPACKED), _size(header, _PACKED)
        if unpacked > MAX_PAGE_BYTES:
            raise _Fault(f"unpacks to {unpacked} bytes; at most {MAX_PAGE_BYTES} are taken. Write smaller pages")
        at += length + packed
        if at > end:
            raise _Fault("reaches beyond its column: the file is damaged")
        seen += _count(header, unpacked, nested=chunk.nested)
        largest = max(largest, unpacked)
    if seen != chunk.values:
        raise _Fault(f"is one too many: they hold {seen} values, the footer says {chunk.values}")
    return largest


def _header(stream: IO[bytes], at: int, end: int) -> tuple[Struct, int]:
    for limit in (FIRST_READ, MAX_HEADER_BYTES):
        stream.seek(at)
        data = stream.read(min(limit, end - at))
        try:
            return read_struct(data)
        except CutShort:
            continue
        except Malformed as failure:
            raise _Fault(f"has a damaged header ({failure})") from failure
    raise _Fault("has a header that is too long or cut short: the file is damaged")


def _size(header: Struct, field: int) -> int:
    value = header.get(field)
    if not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise _Fault("has a header without sizes: the file is damaged")
    return value


def _count(header: Struct, unpacked: int, *, nested: bool) -> int:
    """Values of a data page. A dictionary has none, but no more entries than bytes."""
    kind = header.get(1)
    if kind == _DICTIONARY_TYPE:
        own = header.get(_DICTIONARY_FIELD)
        if not isinstance(own, dict) or _size(own, _VALUES) > unpacked:
            raise _Fault("has an impossible dictionary: the file is damaged")
        return 0
    own = header.get(_PAGE_TYPES.get(kind, 0)) if isinstance(kind, int) else None
    if not isinstance(own, dict) or not isinstance(kind, int):
        raise _Fault("is of an unknown kind: the file is damaged")
    if nested and own.get(_ENCODING_FIELDS[kind]) == _DELTA_BYTE_ARRAY:
        raise _Fault("is delta-encoded, which lists of words may not be: write it with plain or dictionary encoding")
    return _size(own, _VALUES)
