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
from worker.vetting.parquet import MAX_NESTED_VALUES, Chunk, largest_page, read_footer


def varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def written(path: Path, column: Any, **options: Any) -> Path:
    """A file with that one column."""
    parquet.write_table(pa.table({"x": column}), path, **options)
    return path


def measured(path: Path, *, nested: bool = False) -> int:
    footer = read_footer(path, "x.parquet", DatasetRejected)
    chunks = [group[0] for group in footer.groups]
    return largest_page(path, "x.parquet", chunks, footer.start, DatasetRejected, nested=nested)


def lying(path: Path, chunk: Chunk, end: int, *, nested: bool = False) -> int:
    return largest_page(path, "x.parquet", [chunk], end, DatasetRejected, nested=nested)


def test_the_footer_is_read_as_arrow_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    rows = {"a": list(range(90)), "b": [[str(n)] * (n % 4) for n in range(90)], "c": ["x"] * 90}
    parquet.write_table(pa.table(rows), path, row_group_size=40)
    footer, metadata = read_footer(path, "x", DatasetRejected), parquet.read_metadata(path)
    assert footer.start == path.stat().st_size - 8 - metadata.serialized_size
    assert len(footer.groups) == metadata.num_row_groups == 3
    for number, group in enumerate(footer.groups):
        theirs = metadata.row_group(number)
        for chunk, column in zip(group, map(theirs.column, range(3)), strict=True):
            start = column.dictionary_page_offset or column.data_page_offset
            expected = Chunk(start, column.total_compressed_size, column.num_values, theirs.num_rows)
            assert chunk == expected


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
    assert 70_004 <= measured(made) <= 70_004 + 10


def test_a_dictionary_counts_as_a_page(tmp_path: Path) -> None:
    assert measured(written(tmp_path / "x", pa.array(["y" * 50_000] * 1000))) == 50_004


def test_many_pages_and_long_statistics(tmp_path: Path) -> None:
    texts = [f"{n:06}" * 1000 for n in range(200)]  # statistics of 12,000 bytes a page
    made = written(tmp_path / "x", pa.array(texts), use_dictionary=False, data_page_size=20_000, write_batch_size=1)
    assert 20_000 < measured(made) < 40_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": 1}, "lies outside"),
        ({"start": -5}, "lies outside"),
        ({"size": 1 << 40}, "lies outside"),
        ({"size": -1}, "lies outside"),
        ({"size": 20}, "too long or cut short|reaches beyond"),
        ({"start": 9}, "damaged|cannot be read"),
        ({"values": 99}, "has 99 of 100 values"),
        ({"values": 99, "rows": 99}, "they hold 100 values, the footer says 99"),
        ({"values": 101, "rows": 101}, "cannot be read"),
        ({"values": -1, "rows": -1}, "cannot be read"),
    ],
)
def test_a_footer_that_lies_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = written(tmp_path / "x", pa.array([str(n) for n in range(100)]))
    footer = read_footer(path, "x", DatasetRejected)
    with pytest.raises(DatasetRejected, match=words):
        lying(path, replace(footer.groups[0][0], **changes), footer.start)


def test_a_row_group_of_too_many_words_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "x", pa.array([["a"]]))
    with pytest.raises(DatasetRejected, match="smaller row groups"):
        lying(path, Chunk(4, 10, MAX_NESTED_VALUES + 1, 1), path.stat().st_size, nested=True)


def column_of(file_path: bytes = b"", **numbers: int) -> bytes:
    """A ColumnChunk with those numbers of its ColumnMetaData by field."""
    about, last = b"", 0
    for name, value in sorted(numbers.items(), key=lambda item: int(item[0][1:])):
        about += bytes([(int(name[1:]) - last) << 4 | 6]) + varint(value * 2)
        last = int(name[1:])
    named = b"\x18" + varint(len(file_path)) + file_path if file_path else b""
    return named + bytes([(2 if file_path else 3) << 4 | 12]) + about + b"\0\0"


def footed(column: bytes, rows: bytes = b"\x26\x02") -> bytes:
    """A file whose footer has one row group of that one column."""
    footer = b"\x49\x1c" + b"\x19\x1c" + column + rows + b"\0\0"
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (footed(column_of(f5=1, f7=2)), "leaves a column undescribed"),
        (footed(b"\0"), "leaves a column undescribed"),
        (footed(column_of(f5=1, f7=2, f9=4), rows=b""), "leaves a column undescribed"),
        (footed(column_of(b"/etc/passwd", f5=1, f7=2, f9=4)), "another file, which is never opened"),
        (b"PAR1" + b"\xff" * 30 + (30).to_bytes(4, "little") + b"PAR1", "footer cannot be read"),
        (b"PAR1" + b"\x49\xfc\xff\xff\x03" + (5).to_bytes(4, "little") + b"PAR1", "footer cannot be read"),
    ],
)
def test_a_damaged_footer_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(DatasetRejected, match=words):
        read_footer(path, "x", DatasetRejected)


def test_a_footer_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(footed(column_of(f5=1, f7=2, f9=40, f11=9)))
    assert read_footer(path, "x", DatasetRejected).groups == ((Chunk(9, 2, 1, 1),),)


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
        (page(0, 8, 4, 5, 1).replace(b"\x15\x10", b"\x15\x01", 1), "without sizes"),  # -1
        (page(0, 8, 4, 5, 2_000_000_000), "they hold 2000000000 values"),
        (page(2, 8, 4, 7, 9), "impossible dictionary"),
        (page(2, 8, 4, 5, 1), "without sizes"),
        (page(1, 8, 4, 6, 1), "unknown kind"),
        (page(9, 8, 4, 5, 1), "unknown kind"),
        (page(0, 8, 4, 8, 1), "without sizes"),
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
        lying(path, Chunk(4, len(header) + 8, 1, 1), 4 + len(header) + 8)


def test_a_page_that_tells_the_truth_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "x"
    header = page(0, 77, 4, 5, 1)
    path.write_bytes(b"PAR1" + header + bytes(8))
    assert lying(path, Chunk(4, len(header) + 8, 1, 1), 4 + len(header) + 8) == 77


def test_lists_may_not_be_delta_encoded(tmp_path: Path) -> None:
    words = pa.array([["same prefix 1", "same prefix 2"]])
    made = written(tmp_path / "x", words, use_dictionary=False, column_encoding={"x.list.element": "DELTA_BYTE_ARRAY"})
    with pytest.raises(DatasetRejected, match="delta-encoded"):
        measured(made, nested=True)
    flat = written(
        tmp_path / "y", pa.array(["a", "ab"]), use_dictionary=False, column_encoding={"x": "DELTA_BYTE_ARRAY"}
    )
    assert measured(flat) > 0


def test_numbers_have_pages_too(tmp_path: Path) -> None:
    made = written(tmp_path / "x", pa.array(np.arange(1000)), use_dictionary=False, compression="none")
    assert 8000 <= measured(made) < 8200
