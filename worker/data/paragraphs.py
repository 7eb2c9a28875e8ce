"""Plain text: a sample is a paragraph, or a line where the file has no blank lines, of at most 4,096 characters."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from app.contract.errors import DatasetRejected
from worker.data.collect import Sample

MAX_CHARACTERS = 4096  # about a thousand tokens, what the smallest language models see at once
LOOK_BACK = 1024  # characters before a cut in which a space is looked for
PIECE_BYTES = 64 << 10  # read at a time: a line may be as long as the file


@dataclass(frozen=True)
class _Piece:
    """A line or a part of one: its line's number, whether the line ends with it, whether all of the line is blank."""

    line: int
    text: str
    ends: bool
    blank: bool


def paragraphs(opened: Callable[[], IO[bytes]], name: str, split: str) -> Iterator[Sample]:
    """The samples of a file in order, which is read twice; longer ones are cut, at a space if one is near.

    Raises DatasetRejected where the text is not UTF-8, naming the line.
    """
    by_line = not _has_paragraphs(opened, name)
    text, start = "", 1
    for piece in _pieces(opened, name):
        if piece.blank:
            yield from _sample(text, name, start, split)
            text = ""
            continue
        start = start if text else piece.line
        text += piece.text
        while len(text) > MAX_CHARACTERS:
            cut = _cut(text)
            yield from _sample(text[:cut], name, start, split)
            text, start = text[cut:], piece.line
        if by_line and piece.ends:
            yield from _sample(text, name, start, split)
            text = ""
    yield from _sample(text, name, start, split)


def _sample(text: str, name: str, start: int, split: str) -> Iterator[Sample]:
    if text := text.strip():
        yield Sample("text", text, None, split, f"{name!r}, line {start}")


def _cut(text: str) -> int:
    """Where to cut a text that is too long."""
    reach = (MAX_CHARACTERS - LOOK_BACK, MAX_CHARACTERS + 1)
    space = max(text.rfind(" ", *reach), text.rfind("\n", *reach))
    return space if space > 0 else MAX_CHARACTERS


def _has_paragraphs(opened: Callable[[], IO[bytes]], name: str) -> bool:
    """Whether a blank line stands between two lines of text."""
    before = after = False
    for piece in _pieces(opened, name):
        if not piece.blank and after:
            return True
        before = before or not piece.blank
        after = before and piece.blank
    return False


def _pieces(opened: Callable[[], IO[bytes]], name: str) -> Iterator[_Piece]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, fresh = 1, True
    with opened() as stream:
        try:
            while data := stream.readline(PIECE_BYTES):
                ends = data.endswith(b"\n")
                text = decoder.decode(data).replace("\r\n", "\n")
                yield _Piece(line, text, ends, fresh and ends and not text.strip())
                line, fresh = line + ends, ends
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as failure:
            raise DatasetRejected(f"{name!r}, line {line} is not UTF-8: save the dataset as UTF-8 text.") from failure
