"""What samples consist of: sequences that decode one sample when it is asked for, and describe themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

from PIL.Image import Image

from app.contract.errors import DatasetRejected
from app.contract.facts import DataKind, Dimension, TensorFacts
from worker.data import sounds
from worker.data.base import Sound
from worker.data.pictures import channels, decode, open_picture
from worker.data.spool import Members, Records, Spool
from worker.vetting.archive import Member

MAX_PICTURE_BYTES = 256 << 20
# Decoded in full while a dataset is opened, some 3 s of work; of what comes later only the headers are read.
DECODED_PIXELS = 1 << 28
DECODED_FRAMES = 1 << 28

Content: TypeAlias = str | list[str] | Member
Decoded: TypeAlias = str | list[str] | Image | Sound


class Contents(Protocol):
    """The inputs of one split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Decoded: ...

    def append(self, content: Content) -> None:
        """Adds a sample after checking it. Raises DatasetRejected."""

    def facts(self) -> TensorFacts: ...


class Texts:
    """Strings in a spool."""

    def __init__(self, spool: Spool) -> None:
        self._records = Records(spool)

    def append(self, content: Content) -> None:
        assert isinstance(content, str)
        self._records.append(content.encode("utf-8", "replace"))  # a lone surrogate of a JSON escape has no UTF-8

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        return self._records[index].decode()

    def facts(self) -> TensorFacts:
        return TensorFacts(name="text", shape=(), dtype="string")


class Words:
    """Lists of words in a spool."""

    def __init__(self, spool: Spool) -> None:
        self._records = Records(spool)

    def append(self, content: Content) -> None:
        assert isinstance(content, list)
        self._records.append(json.dumps(content).encode())

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> list[str]:
        words: list[str] = json.loads(self._records[index])
        return words

    def facts(self) -> TensorFacts:
        return TensorFacts(name="tokens", shape=(None,), dtype="string")


class Pictures:
    """Picture files. All headers are read; pixels are decoded while the budget lasts, which splits share."""

    def __init__(self, spool: Spool, budget: list[int]) -> None:
        self._members = Members(spool)
        self._budget = budget
        self._shape: tuple[Dimension, ...] | None = None

    def append(self, content: Content) -> None:
        assert isinstance(content, Member)
        _check_size(content, MAX_PICTURE_BYTES)
        with content.open() as stream:
            image = open_picture(stream, content.name)
            self._budget[0] -= image.width * image.height
            if self._budget[0] >= 0:
                decode(image, content.name)
            self._shape = _joined(self._shape, (channels(image), image.height, image.width))
        self._members.append(content)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Image:
        member = self._members[index]
        _check_size(member, MAX_PICTURE_BYTES)
        with member.open() as stream:
            return decode(open_picture(stream, member.name), member.name)

    def facts(self) -> TensorFacts:
        return TensorFacts(name="image", shape=self._shape or (), dtype="uint8")


class Sounds:
    """Sound files. All headers are read; samples are decoded while the budget lasts, which splits share."""

    def __init__(self, spool: Spool, budget: list[int]) -> None:
        self._members = Members(spool)
        self._budget = budget
        self._shape: tuple[Dimension, ...] | None = None

    def append(self, content: Content) -> None:
        assert isinstance(content, Member)
        data = _bytes(content)
        header = sounds.read_header(data, content.name)
        frames = header.frames
        self._budget[0] -= max(frames, len(data))  # a FLAC file may hide its length
        if self._budget[0] >= 0:
            frames = len(sounds.decode(data, content.name).samples)
        self._shape = _joined(self._shape, (frames,))
        self._members.append(content)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Sound:
        member = self._members[index]
        return sounds.decode(_bytes(member), member.name)

    def facts(self) -> TensorFacts:
        return TensorFacts(name="sound", shape=self._shape or (), dtype="float32")


def contents_of(spool: Spool) -> dict[DataKind, Callable[[], Contents]]:
    """A maker of empty contents by the kind of data; budgets are those of one dataset."""
    pixels, frames = [DECODED_PIXELS], [DECODED_FRAMES]
    return {
        "text": lambda: Texts(spool),
        "tokens": lambda: Words(spool),
        "images": lambda: Pictures(spool, pixels),
        "audio": lambda: Sounds(spool, frames),
    }


def _joined(shape: tuple[Dimension, ...] | None, other: Iterable[int]) -> tuple[Dimension, ...]:
    """The shape of all samples: a dimension that differs is open."""
    if shape is None:
        return tuple(other)
    return tuple(a if a == b else None for a, b in zip(shape, other, strict=True))


def _bytes(member: Member) -> bytes:
    _check_size(member, sounds.MAX_FILE_BYTES)
    with member.open() as stream:
        return stream.read()


def _check_size(member: Member, limit: int) -> None:
    if member.size > limit:
        raise DatasetRejected(f"{member.name!r} has {member.size} bytes; at most {limit} are taken.")
