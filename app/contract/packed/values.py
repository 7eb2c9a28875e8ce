"""Which values the elements have: the few that there are and which of them, or parts of their bits.

- codebook: the distinct bit patterns, then for each element its place among them, by their frequencies;
- steps, of float32, float16 and bfloat16: whole numbers by their frequencies, and the step of each run of elements,
  itself written as values;
- bare: bit patterns as they are;
- planes: of each element the 8 bits that hold most of its exponent, by their frequencies, and the others as they are.
Either of the values themselves, or, where none loses anything by it, of a float format half as wide.
"""

from __future__ import annotations

import numpy as np

from app.contract.packed import models, steps
from app.contract.packed.coder import CHUNK
from app.contract.packed.draft import Draft, Source
from app.contract.packed.steps import Mask, Steps
from app.contract.packed.stored import DTYPES, FLOATS, WORDS, Words, floats_of, words_of_floats
from app.contract.packed.wire import Damaged

CODEBOOK, PLANES, BARE, STEPS = range(4)
KINDS = 4  # that a byte has room for, beside what values are narrowed to
NARROW = ("", "F16", "BF16")  # formats that float32 is written in where it loses nothing
MOST_ENTRIES = 4096
UNKNOWN = "Values are written in a way that this version does not know, or the file is damaged."
SAMPLE = 1 << 16  # elements that tell whether it is worth to sort all


def write(words: Words, dtype: str, draft: Draft, mask: Mask | None = None) -> float:
    """Writes one element or more, those that are set in `mask` where they may lie on a grid; returns how many of the
    bits are for the codebook."""
    on_grids = [] if mask is None or dtype not in steps.DTYPES else list(steps.grids(words, dtype, mask))
    narrow = _narrowest(words) if dtype == "F32" else 0
    if narrow:
        words, dtype = _narrowed(words, NARROW[narrow]), NARROW[narrow]
    entries = _entries(words)
    ways = []
    if entries is not None:
        ways.append(_by_codebook(words, entries, narrow))
    ways += [_by_steps(grid) for grid in on_grids]
    ways.append((_bare(words, narrow), 0.0))
    if dtype in FLOATS or entries is None:
        ways.append((_by_planes(words, narrow), 0.0))
    best, codebook = min(ways, key=lambda way: way[0].bits)
    draft.extend(best)
    return codebook


def read(count: int, dtype: str, source: Source, mask: Mask | None = None) -> Words:
    """`count` elements, one or more, those that are set in `mask`. Raises Damaged."""
    byte = source.header.byte()
    kind, narrow = byte % KINDS, byte // KINDS
    if narrow >= len(NARROW) or (narrow and dtype != "F32"):
        raise Damaged(UNKNOWN)
    if kind == STEPS:
        if mask is None or dtype not in steps.DTYPES or narrow:
            raise Damaged(UNKNOWN)
        return _read_steps(count, dtype, mask, source)
    words = _READERS[kind](count, NARROW[narrow] or dtype, source)
    return _widened(words, NARROW[narrow]) if narrow else words


def _entries(words: Words) -> Words | None:
    """The distinct ones in ascending order, or None where they are too many for a codebook."""
    if len(words) > SAMPLE and len(np.unique(words[:: len(words) // SAMPLE])) > MOST_ENTRIES:
        return None
    entries = np.unique(words)
    return entries if len(entries) <= MOST_ENTRIES else None


def _by_codebook(words: Words, entries: Words, narrow: int) -> tuple[Draft, float]:
    draft = Draft()
    draft.header.raw(bytes([CODEBOOK + KINDS * narrow]))
    draft.header.number(len(entries) - 1)
    draft.header.raw(entries.astype(entries.dtype.newbyteorder("<")).tobytes())
    if len(entries) > 1:
        places = np.searchsorted(entries, words)
        bytes_ = models.quantized(np.bincount(places))
        draft.header.raw(bytes_.tobytes())
        codebook = draft.bits
        draft.coded.put(places, models.probabilities(bytes_))
        return draft, codebook
    return draft, draft.bits


def _read_codebook(count: int, dtype: str, source: Source) -> Words:
    number = source.header.number(MOST_ENTRIES - 1) + 1
    word = WORDS[DTYPES[dtype]]
    entries = np.frombuffer(source.header.raw(number * DTYPES[dtype]), np.dtype(word).newbyteorder("<")).astype(word)
    if number == 1:
        return np.full(count, entries[0])
    chances = models.probabilities(np.frombuffer(source.header.raw(number), np.uint8))
    words = np.empty(count, word)
    for part, places in source.coded.chunks(count, chances):
        np.take(entries, places, out=words[part])
    return words


def _by_steps(grid: Steps) -> tuple[Draft, float]:
    draft = Draft()
    draft.header.raw(bytes([STEPS]))
    draft.header.number(grid.length)
    codes, counts = np.unique(grid.codes, return_counts=True)
    draft.header.number(len(codes) - 1)
    draft.header.number(int(codes[0]) + steps.MOST)
    for gap in np.diff(codes):
        draft.header.number(int(gap) - 1)
    if len(codes) > 1:
        bytes_ = models.quantized(counts)
        draft.header.raw(bytes_.tobytes())
    write(grid.steps.view(np.uint32), "F32", draft)
    codebook = draft.bits
    if len(codes) > 1:
        draft.coded.put(np.searchsorted(codes, grid.codes), models.probabilities(bytes_))
    return draft, codebook


def _read_steps(count: int, dtype: str, mask: Mask, source: Source) -> Words:
    length = source.header.number(mask.size)
    if not steps.divides(length, mask):
        raise Damaged("Runs of elements do not fit their tensor. The file is damaged: fetch it again.")
    number = source.header.number(steps.MOST + steps.NEGATIVE_ZERO) + 1
    codes = np.empty(number, np.int16)
    codes[0] = source.header.number(steps.MOST + steps.NEGATIVE_ZERO) - steps.MOST
    for place in range(1, number):
        codes[place] = codes[place - 1] + 1 + source.header.number(steps.MOST + steps.NEGATIVE_ZERO)
        if codes[place] > steps.NEGATIVE_ZERO:
            raise Damaged("A value is larger than any can be. The file is damaged: fetch it again.")
    chances = models.probabilities(np.frombuffer(source.header.raw(number), np.uint8)) if number > 1 else None
    counts = steps.counts_of(mask, length)
    counts = counts[counts > 0]
    per = np.repeat(read(len(counts), "F32", source).view(np.float32), counts)
    words = np.empty(count, WORDS[DTYPES[dtype]])
    if chances is None:
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            words[part] = steps.words_of(np.full(len(per[part]), codes[0]), per[part], dtype)
        return words
    for part, places in source.coded.chunks(count, chances):
        words[part] = steps.words_of(codes[places], per[part], dtype)
    return words


def _by_planes(words: Words, narrow: int) -> Draft:
    draft = Draft()
    draft.header.raw(bytes([PLANES + KINDS * narrow]))
    columns = _rotated(words, 1).astype(words.dtype.newbyteorder("<")).view(np.uint8).reshape(len(words), -1)
    known = np.unique(columns[:, -1])
    draft.header.number(len(known) - 1)
    draft.header.raw(known.tobytes())
    if len(known) > 1:
        places = np.searchsorted(known, columns[:, -1])
        bytes_ = models.quantized(np.bincount(places))
        draft.header.raw(bytes_.tobytes())
        draft.coded.put(places, models.probabilities(bytes_))
    draft.bare.raw(columns[:, :-1].tobytes())
    return draft


def _read_planes(count: int, dtype: str, source: Source) -> Words:
    number = source.header.number(255) + 1
    known = np.frombuffer(source.header.raw(number), np.uint8)
    wide = DTYPES[dtype]
    columns = np.empty((count, wide), np.uint8)
    if wide > 1:
        rest = np.frombuffer(source.bare.raw(count * (wide - 1)), np.uint8)
        columns[:, :-1] = rest.reshape(count, wide - 1)
    columns[:, -1] = known[0]
    if number > 1:
        chances = models.probabilities(np.frombuffer(source.header.raw(number), np.uint8))
        for part, places in source.coded.chunks(count, chances):
            columns[part, -1] = known[places]
    word = WORDS[wide]
    return _rotated(columns.view(np.dtype(word).newbyteorder("<")).reshape(-1).astype(word, copy=False), -1)


def _bare(words: Words, narrow: int) -> Draft:
    draft = Draft()
    draft.header.raw(bytes([BARE + KINDS * narrow]))
    draft.bare.raw(words.astype(words.dtype.newbyteorder("<")).tobytes())
    return draft


def _read_bare(count: int, dtype: str, source: Source) -> Words:
    word = WORDS[DTYPES[dtype]]
    return np.frombuffer(source.bare.raw(count * DTYPES[dtype]), np.dtype(word).newbyteorder("<")).astype(word)


_READERS = {CODEBOOK: _read_codebook, PLANES: _read_planes, BARE: _read_bare}


def _rotated(words: Words, left: int) -> Words:
    """Bits moved to the left by one place (1: the sign comes last, and the exponent first) or to the right (-1)."""
    top = words.dtype.itemsize * 8 - 1
    one, rest = words.dtype.type(1), words.dtype.type(top)
    found: Words = words << one | words >> rest if left > 0 else words >> one | words << rest
    return found


def _narrowest(words: Words) -> int:
    """The place in NARROW of a format that holds these float32, bit for bit; 0 where none does."""
    for place in (1, 2):
        if np.array_equal(_widened(_narrowed(words[:SAMPLE], NARROW[place]), NARROW[place]), words[:SAMPLE]) and (
            np.array_equal(_widened(_narrowed(words, NARROW[place]), NARROW[place]), words)
        ):
            return place
    return 0


def _narrowed(words: Words, dtype: str) -> Words:
    if dtype == "BF16":
        return (words >> np.uint32(16)).astype(np.uint16)
    return words_of_floats(words.view(np.float32), dtype)


def _widened(words: Words, dtype: str) -> Words:
    return floats_of(words, dtype).view(np.uint32)
