"""Pages of Parquet: what Arrow wrote is measured as it is, and what a footer or a page lies about is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from app.contract.errors import DatasetRejected
from worker.vetting.parquet import MAX_NESTED_VALUES, Chunk, check_ends, largest_page


def written(path: Path, column: Any, **options: Any) -> tuple[Path, list[Chunk], int]:
    """A file with that one column, its chunks as Arrow's own metadata names them, and where its footer starts."""
    parquet.write_table(pa.table({"x": column}), path, **options)
    end = check_ends(path, "x.parquet", DatasetRejected)
    metadata = parquet.read_metadata(path)
    chunks = []
    for group in range(metadata.num_row_groups):
        own = metadata.row_group(group).column(0)
        start = own.dictionary_page_offset or own.data_page_offset
        rows = metadata.row_group(group).num_rows
        nested = metadata.schema.column(0).max_repetition_level > 0
        chunks.append(Chunk("x", start, own.total_compressed_size, own.num_values, rows, nested))
    return path, chunks, end


def measured(path: Path, chunks: list[Chunk], end: int) -> int:
    return largest_page(path, "x.parquet", chunks, end, DatasetRejected)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_largest_page_is_that_of_the_longest_value(tmp_path: Path, version: str, compression: str) -> None:
    texts = ["a" * 10, "b" * 70_000, "c" * 20, "d"]
    column = pa.array(texts)
    made = written(
        tmp_path / "x",
        column,
        use_dictionary=False,
        compression=compression,
        data_page_version=version,
        row_group_size=1,
        write_statistics=False,
    )
    # A value of 70,000 bytes, its length in four, and the levels of an optional column.
    assert 70_004 <= measured(*made) <= 70_004 + 10


def test_a_dictionary_counts_as_a_page(tmp_path: Path) -> None:
    assert measured(*written(tmp_path / "x", pa.array(["y" * 50_000] * 1000))) == 50_004


def test_many_pages_and_long_statistics(tmp_path: Path) -> None:
    texts = [f"{n:06}" * 1000 for n in range(200)]  # statistics of 12,000 bytes a page
    made = written(tmp_path / "x", pa.array(texts), use_dictionary=False, data_page_size=20_000, write_batch_size=1)
    assert 20_000 < measured(*made) < 40_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": 1}, "lies outside"),
        ({"start": -5}, "lies outside"),
        ({"size": 1 << 40}, "lies outside"),
        ({"size": -1}, "lies outside"),
        ({"elsewhere": True}, "lies outside"),
        ({"size": 20}, "too long or cut short|reaches beyond"),
        ({"start": 9}, "damaged|cannot be read"),
        ({"values": 99}, "has 99 of 100 values"),
        ({"values": 99, "rows": 99}, "they hold 100 values, the footer says 99"),
        ({"values": 101, "rows": 101}, "cannot be read"),
        ({"values": -1, "rows": -1}, "cannot be read"),
        ({"nested": True, "values": MAX_NESTED_VALUES + 1}, "smaller row groups"),
    ],
)
def test_a_footer_that_lies_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path, chunks, end = written(tmp_path / "x", pa.array([str(n) for n in range(100)]))
    with pytest.raises(DatasetRejected, match=words):
        measured(path, [replace(chunks[0], **changes)], end)


def varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def page(kind: int, unpacked: int, packed: int, field: int, values: int, encoding: int = 0) -> bytes:
    """A page header: type, sizes, and in `field` a header of its own with values and encoding."""
    numbers = b"".join(b"\x15" + varint(number * 2) for number in (kind, unpacked, packed))
    own = b"\x15" + varint(values * 2) + b"\x15" + varint(encoding * 2) + b"\0"
    return numbers + bytes([(field - 3) << 4 | 12]) + own + b"\0"


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (page(0, (1 << 31) - 1, 4, 5, 1), "unpacks to 2147483647 bytes; at most"),
        (page(0, 8, 1 << 30, 5, 1), "reaches beyond its column"),
        (page(0, 1 << 33, 4, 5, 1), "without sizes"),
        (page(0, 8, 4, 5, 2_000_000_000), "they hold 2000000000 values"),
        (page(2, 8, 4, 7, 9), "impossible dictionary"),
        (page(2, 8, 4, 5, 1), "impossible dictionary"),
        (page(1, 8, 4, 6, 1), "unknown kind"),
        (page(9, 8, 4, 5, 1), "unknown kind"),
        (page(0, 8, 4, 8, 1), "unknown kind"),
        (b"\x15\x00\x15\x10\0", "without sizes"),
        (b"\x15\x00\x25\x10\0", "without sizes"),
        (b"\x1b\x01", "damaged header"),
        (b"\xff" * 20, "damaged header"),
        (b"\x18\xff\xff\x7f", "too long or cut short"),
    ],
)
def test_a_page_that_lies_is_refused(tmp_path: Path, header: bytes, words: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"PAR1" + header + bytes(8))
    with pytest.raises(DatasetRejected, match=words):
        measured(path, [Chunk("x", 4, len(header) + 8, 1, 1, False)], 4 + len(header) + 8)


def test_a_page_that_tells_the_truth_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "x"
    header = page(0, 77, 4, 5, 1)
    path.write_bytes(b"PAR1" + header + bytes(8))
    assert measured(path, [Chunk("x", 4, len(header) + 8, 1, 1, False)], 4 + len(header) + 8) == 77


def test_lists_may_not_be_delta_encoded(tmp_path: Path) -> None:
    words = pa.array([["same prefix 1", "same prefix 2"]])
    made = written(tmp_path / "x", words, use_dictionary=False, column_encoding={"x.list.element": "DELTA_BYTE_ARRAY"})
    with pytest.raises(DatasetRejected, match="delta-encoded"):
        measured(*made)
    flat = written(
        tmp_path / "y", pa.array(["a", "ab"]), use_dictionary=False, column_encoding={"x": "DELTA_BYTE_ARRAY"}
    )
    assert measured(*flat) > 0


def test_numbers_have_pages_too(tmp_path: Path) -> None:
    made = written(tmp_path / "x", pa.array(np.arange(1000)), use_dictionary=False, compression="none")
    assert 8000 <= measured(*made) < 8200
