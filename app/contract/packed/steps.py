"""Floats that quantization has left on a grid: whole numbers times a step that a run of elements has in common.

A run is a stretch of the tensor in row-major order: the whole, a row, or a group within a row. A step is nowhere told.
It is near the largest magnitude of the run over a whole number; each element then says between which two numbers it
lies, since the product of the two was rounded to just that element.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from app.contract.packed.stored import Words, floats_of, words_of_floats

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]
Codes = NDArray[np.int16]
Steps64 = NDArray[np.float64]
Counts = NDArray[np.int64]

MOST = 255  # of a whole number: eight bits with a zero point anywhere
FEW = 24  # different values may lie on some fine grid by chance
NEGATIVE_ZERO = MOST + 1  # stands for -0.0, which no whole number gives
DTYPES = {"F32": 24, "F16": 11, "BF16": 8}  # that lie on grids, with the bits that they round to
GROUPS = (256, 128, 64, 32, 16)
LEAST = 8  # elements of a run, unless it is the whole
PROBES = 8  # elements of a run that have to agree on a step before all are looked at
FIRST = 64  # runs that tell whether there is a grid at all


@dataclass(frozen=True)
class Steps:
    """`codes` of the set elements, -MOST to NEGATIVE_ZERO; `steps` of the runs of `length` that have any."""

    length: int
    steps: Floats
    codes: Codes


def grids(words: Words, dtype: str, mask: Mask) -> Iterator[Steps]:
    """The grids, one for a length of runs, that the set elements `words` of a dtype of DTYPES lie on."""
    values = floats_of(words, dtype)
    if not np.isfinite(values).all():
        return
    # Zeros fit any step, and say nothing of which it is.
    told = values != 0
    if not told.any():
        return
    telling = np.array(mask, ndmin=1)
    telling[np.array(mask, ndmin=1)] = told
    for length in _lengths(mask.shape):
        counts, known = counts_of(mask, length), counts_of(telling, length)
        found = _Finder(values[told], words[told], dtype, known[known > 0]).found()
        if found is not None:
            steps = np.ones(len(counts), np.float32)
            steps[known > 0] = found[0]
            codes = np.where(np.signbit(values), np.int16(NEGATIVE_ZERO), np.int16(0))
            codes[told] = found[1]
            yield Steps(length, steps[counts > 0], codes)
            first = np.unique(found[1][: known[known > 0][0]])
            if len(first) > FEW or np.abs(first).max() <= FEW:
                return  # it is no chance, and shorter runs have the same codes and more steps


def words_of(codes: Codes, per: Floats, dtype: str) -> Words:
    """The bits of `codes` times the step of each, a float32 product rounded to the dtype."""
    with np.errstate(over="ignore", invalid="ignore"):  # of a damaged file
        found = words_of_floats(codes.astype(np.float32) * per, dtype)
    found[codes == NEGATIVE_ZERO] = 1 << found.dtype.itemsize * 8 - 1
    return found


def divides(length: int, mask: Mask) -> bool:
    """Whether a tensor can be cut into such runs."""
    return length == mask.size or (length >= LEAST and mask.size % length == 0)


def counts_of(mask: Mask, length: int) -> NDArray[np.int64]:
    """How many elements are set in each run. `length` divides it."""
    found: NDArray[np.int64] = mask.reshape(-1, length).sum(1, dtype=np.int64)
    return found


def _lengths(shape: tuple[int, ...]) -> Iterator[int]:
    yield prod(shape)
    row = prod(shape[1:])
    if len(shape) > 1 and LEAST <= row < prod(shape):
        yield row
        yield from (length for length in GROUPS if length < row and row % length == 0)


class _Finder:
    """Looks for a step for each run, of `counts` elements each, none of them zero."""

    def __init__(self, values: Floats, words: Words, dtype: str, counts: Counts) -> None:
        self._values, self._words, self._dtype, self._counts = values, words, dtype, counts
        self._bits = DTYPES[dtype]
        # Whole numbers that are told apart although they and the step were rounded.
        self._numbers = range(1, min(MOST, 1 << self._bits - 2) + 1)
        self._starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self._tops = np.maximum.reduceat(np.abs(values), self._starts).astype(np.float64)
        self._probes = values[self._starts[:, None] + np.arange(PROBES) * counts[:, None] // PROBES]
        self._steps = np.zeros(len(counts), np.float32)
        self._codes = np.zeros(len(values), np.int16)

    def found(self) -> tuple[Floats, Codes] | None:
        """Steps and codes; None where a run has none."""
        first = np.arange(min(FIRST, len(self._counts)))
        used = self._search(first, self._numbers)  # coarse grids first
        if used is None:
            return None
        # The runs behind them mostly have the numbers of the first ones.
        likely = [*used, *(number for number in self._numbers if number not in used)]
        if self._search(np.arange(len(first), len(self._counts)), likely) is None:
            return None
        return self._steps, self._codes

    def _search(self, runs: Counts, numbers: Sequence[int]) -> list[int] | None:
        """Settles the runs, each by the first of the numbers whose share of its largest is near a step; returns those
        that were of use."""
        used = []
        for number in numbers:
            if not len(runs):
                break
            near = self._tops[runs] / number
            sizes = np.abs(self._probes[runs])
            codes = np.rint(sizes / near[:, None])
            near = _nearer(near, (sizes * codes).sum(1), (codes * codes).sum(1))
            low, high = self._between(self._probes[runs], near[:, None])
            likely = low.max(1) <= high.min(1)
            if not likely.any():
                continue
            settled = np.zeros(len(runs), np.bool_)
            settled[likely] = self._settle(runs[likely], near[likely])
            if settled.any():
                used.append(number)
            runs = runs[~settled]
        return None if len(runs) else sorted(used)

    def _settle(self, runs: Counts, near: Steps64) -> NDArray[np.bool_]:
        """Whether all elements of these runs agree on a step near those; then it and their codes are kept."""
        chosen = np.zeros(len(self._counts), np.bool_)
        chosen[runs] = True
        places = np.flatnonzero(np.repeat(chosen, self._counts))
        counts = self._counts[runs]
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        values = self._values[places]
        sizes = np.abs(values)
        guess = np.rint(sizes / np.repeat(near, counts))
        near = _nearer(near, np.add.reduceat(sizes * guess, starts), np.add.reduceat(guess * guess, starts))
        per = np.repeat(near, counts)
        low, high = self._between(values, per)
        middle = ((np.maximum.reduceat(low, starts) + np.minimum.reduceat(high, starts)) / 2).astype(np.float32)
        codes = np.clip(np.rint(values / per), -MOST, MOST).astype(np.int16)
        settled = np.zeros(len(runs), np.bool_)
        with np.errstate(over="ignore"):
            above = np.nextafter(middle, np.float32(np.inf))
        for steps in (middle, np.nextafter(middle, np.float32(0)), above):
            right = words_of(codes, np.repeat(steps, counts), self._dtype) == self._words[places]
            new = np.logical_and.reduceat(right, starts) & ~settled
            self._steps[runs[new]] = steps[new]
            settled |= new
        self._codes[places] = codes
        return settled

    def _between(self, values: Floats, near: Steps64) -> tuple[Steps64, Steps64]:
        """The least and the greatest step of which each value is a whole number of times, after rounding."""
        size = np.abs(values.astype(np.float64))
        codes = np.rint(size / near)
        bad = (codes > MOST) | (codes == 0)
        half = np.spacing(size) * 2.0 ** (52 - self._bits)  # of what the dtype rounds to
        below = np.where(np.frexp(size)[0] == 0.5, half / 2, half)  # numbers lie closer under a power of two
        codes = np.maximum(codes, 1)
        low, high = (size - below) / codes, (size + half) / codes
        low[bad] = np.inf
        return low, high


def _nearer(near: Steps64, products: Steps64, squares: Steps64) -> Steps64:
    """Steps by least squares, of sums of sizes times codes and of codes squared: the largest alone has been rounded."""
    return np.where(squares > 0, products / np.maximum(squares, 1), near)
