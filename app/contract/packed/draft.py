"""Where a tensor is written to before it is known whether that is the shortest way: header, bare bytes and symbols."""

from __future__ import annotations

from app.contract.packed.coder import Decoder, Encoder
from app.contract.packed.wire import Reader, Writer


class Draft:
    """The three parts of a file that tensors are written to."""

    def __init__(self) -> None:
        self.header, self.bare, self.coded = Writer(), Writer(), Encoder()

    @property
    def bits(self) -> float:
        """How much it takes so far."""
        return 8 * (len(self.header.data) + len(self.bare.data)) + self.coded.bits

    def extend(self, other: Draft) -> None:
        """Appends another draft."""
        self.header.raw(bytes(other.header.data))
        self.bare.raw(bytes(other.bare.data))
        self.coded.extend(other.coded)


class Source:
    """The three parts of a file that tensors are read from."""

    def __init__(self, header: Reader, bare: Reader, coded: Decoder) -> None:
        self.header, self.bare, self.coded = header, bare, coded
