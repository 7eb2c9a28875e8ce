"""The entropy coder: constriction's asymmetric numeral systems (Duda 2013; Bamler 2022), one stream a file."""

from __future__ import annotations

from collections.abc import Iterator

import constriction
import numpy as np
from numpy.typing import NDArray

from app.contract.packed.wire import Damaged

AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical

Symbols = NDArray[np.int32]
Probabilities = NDArray[np.float64]

CHUNK = 1 << 20  # symbols at a time: what is decoded on the way to a tensor stays small beside it
WORD = 4  # bytes


class Encoder:
    """Takes symbols in the order in which they will be read."""

    def __init__(self) -> None:
        self._parts: list[tuple[Symbols, Probabilities]] = []
        self.bits = 0.0

    def put(self, symbols: NDArray[np.integer], chances: Probabilities) -> None:
        """Symbols 0 to len(chances) - 1 (2 or more), each with its probability."""
        self.bits -= float(np.bincount(symbols, minlength=len(chances)) @ np.log2(chances))
        self._parts.append((symbols.astype(np.int32), chances))

    def extend(self, other: Encoder) -> None:
        """Appends what another one has taken."""
        self._parts += other._parts
        self.bits += other.bits

    def finish(self) -> bytes:
        """The stream: 32-bit words, little endian, without the zero bytes at its end."""
        coder = AnsCoder()
        for symbols, chances in reversed(self._parts):
            coder.encode_reverse(symbols, Categorical(chances, perfect=False))
        words: NDArray[np.uint32] = coder.get_compressed()
        return words.astype("<u4").tobytes().rstrip(b"\0")


class Decoder:
    """Gives them back. Raises Damaged where the stream is none."""

    def __init__(self, data: bytes | memoryview) -> None:
        padded = bytes(data).rstrip(b"\0")
        if len(padded) != len(data):
            raise Damaged("The coded part ends in zeros, which none does. The file is damaged: fetch it again.")
        words = np.frombuffer(padded + bytes(-len(padded) % WORD), "<u4")
        self._coder = AnsCoder(words.astype(np.uint32))

    def take(self, count: int, chances: Probabilities) -> Symbols:
        """The next symbols, all at once: for few."""
        found: Symbols = self._coder.decode(Categorical(chances, perfect=False), count)
        return found

    def chunks(self, count: int, chances: Probabilities) -> Iterator[tuple[slice, Symbols]]:
        """The next symbols, with the places that they are for, in parts of at most CHUNK."""
        model = Categorical(chances, perfect=False)
        for start in range(0, count, CHUNK):
            part = slice(start, min(start + CHUNK, count))
            yield part, self._coder.decode(model, part.stop - part.start)

    def finish(self) -> None:
        """Raises Damaged unless everything was taken."""
        if not self._coder.is_empty():
            raise Damaged("Symbols are left over at the end of the file. It is damaged: fetch it again.")
