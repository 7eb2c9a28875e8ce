"""Plain text: paragraphs, lines where there are none, long ones cut; nothing is lost but white space at the edges."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.contract.errors import DatasetRejected
from tests.worker.data.files import opened
from tests.worker.loading.files import tarred, zipped
from worker.data.base import Data


def texts(data: Data, split: str = "train") -> list[str]:
    inputs = data.splits[split].read(range(len(data.splits[split]))).inputs
    assert isinstance(inputs, list)
    return [text for text in inputs if isinstance(text, str)]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_blank_lines_part_paragraphs(tmp_path: Path, newline: str) -> None:
    content = "\n\nOne line,\nand another.\n \t\n\nSecond \u00fc.\n".replace("\n", newline)
    data = opened("\ufeff" + content, tmp_path, "book.txt")
    assert (data.facts.kind, data.facts.splits["train"].targets) == ("text", None)
    assert texts(data) == ["One line,\nand another.", "Second \u00fc."]


def test_without_blank_lines_between_them_lines_are_samples(tmp_path: Path) -> None:
    assert texts(opened("\n\none\ntwo\nthree\n\n", tmp_path, "lines.txt")) == ["one", "two", "three"]


def test_long_paragraphs_are_cut_at_a_space(tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(3000))
    pieces = texts(opened(f"short\n\n{words}\n\nend", tmp_path, "long.txt"))
    assert (pieces[0], pieces[-1]) == ("short", "end")
    assert all(3000 < len(piece) <= 4096 for piece in pieces[1:-2])
    assert " ".join(pieces[1:-1]) == words


def test_a_line_without_spaces_and_larger_than_any_buffer_is_cut_hard(tmp_path: Path) -> None:
    line = "\u20ac" * 100_000  # three bytes each, so that buffers end within a character
    pieces = texts(opened(line, tmp_path, "one.txt", {"split": False}))
    assert [len(piece) for piece in pieces[:-1]] == [4096] * 24
    assert "".join(pieces) == line


def test_an_archive_holds_a_text_a_split(tmp_path: Path) -> None:
    files = {"corpus/train.txt": b"a\n\nb", "corpus/val-00001.txt": b"c", "corpus/README.txt": b"free"}
    for pack in (zipped, tarred):
        data = opened(pack(files), tmp_path)
        assert (texts(data), texts(data, "validation")) == (["a", "b"], ["c"])


@pytest.mark.parametrize("first", ['{"text": "a", "label": 1}', "text,label\na,1"])
def test_rows_in_a_file_that_is_called_text_are_rows(tmp_path: Path, first: str) -> None:
    assert opened(first + "\n", tmp_path, "rows.txt").facts.splits["train"].targets == "classes"


def test_prose_that_begins_like_json_is_prose(tmp_path: Path) -> None:
    assert texts(opened("[Chapter 1]\n\nIt was {dark}.", tmp_path, "book.txt")) == ["[Chapter 1]", "It was {dark}."]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"one\ntwo\nf\xfcr\n", "'a.txt', line 3 is not UTF-8"),
        ("a.txt", "one and two and three \u20ac".encode()[:-1], "line 1 is not UTF-8"),
        ("a.txt", b" \n\t\n", "no rows"),
        ("a", b"one\ntwo\n", "no header with a column `text`"),
        ("a.txt", b'{"text": "a"}\n{"text": \n', "line 2 is no JSON"),
    ],
)
def test_faults_are_named_by_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    with pytest.raises(DatasetRejected, match=words):
        opened(content, tmp_path, name)
