"""A stretch of a file reads as a file of its own, and never a byte beyond."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from worker.vetting.section import Section

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def section(tmp_path: Path) -> Section:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return Section(path, 100, 200_000)


def test_it_reads_as_the_same_bytes_in_memory(section: Section) -> None:
    expected = io.BytesIO(CONTENT[100:200_100])
    with section.open() as stream:
        for offset, whence, size in [
            (0, 0, 10),
            (5, 1, 70_000),
            (-3, 2, 10),
            (150_000, 0, -1),
            (300_000, 0, 5),
            (0, 0, -1),
        ]:
            assert stream.seek(offset, whence) == expected.seek(offset, whence)
            assert stream.read(size) == expected.read(size)
            assert stream.tell() == expected.tell()


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before\none\ntwo\nafter")
    with Section(path, 7, 8).open() as stream:
        assert stream.readlines() == [b"one\n", b"two\n"]


def test_a_stretch_of_a_stretch(section: Section) -> None:
    with section.within(10, 5).open() as stream:
        assert stream.read() == CONTENT[110:115]


def test_a_position_before_the_start_is_refused(section: Section) -> None:
    with section.open() as stream, pytest.raises(ValueError, match="before the start"):
        stream.seek(-1)


def test_a_file_that_became_shorter_ends_early(section: Section) -> None:
    section.path.write_bytes(b"x" * 105)
    with section.open() as stream:
        assert stream.read() == b"x" * 5
