"""Floats that quantization has left on a grid: whole numbers times a step that a run of elements has in common.

A run is a stretch of the tensor in row-major order: the whole, a row, or a group within a row. A step is nowhere told;
it is the largest magnitude of the run over a whole number, or next to that in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from app.contract.packed.stored import Words

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]

MOST = 255  # of a whole number: eight bits with a zero point anywhere
NEGATIVE_ZERO = MOST + 1  # stands for -0.0, which no whole number gives
_SIGN = np.uint32(1 << 31)
GROUPS = (256, 128, 64, 32, 16)
LEAST = 8  # elements of a run, unless it is the whole
PROBES = 8  # elements of a run that a step has to fit before all are looked at
FIRST = 64  # runs that tell whether there is a grid at all


@dataclass(frozen=True)
class Steps:
    """`codes` of the set elements, -MOST to NEGATIVE_ZERO; `steps` of the runs of `length` that have any."""

    length: int
    steps: Floats
    codes: NDArray[np.int16]


def find(words: Words, mask: Mask) -> Steps | None:
    """The grid of float32 `words`, those of the set elements; None where there is none."""
    values = words.view(np.float32)
    if not np.isfinite(values).all():
        return None
    for length in _lengths(mask.shape):
        counts = counts_of(mask, length)
        steps = _steps(values, counts[counts > 0])
        if steps is not None:
            per = np.repeat(steps, counts[counts > 0])
            codes = np.rint(values / per).astype(np.int16)
            codes[words == _SIGN] = NEGATIVE_ZERO
            return Steps(length, steps, codes)
    return None


def words_of(codes: NDArray[np.int16], per: Floats) -> Words:
    """The bits of `codes` times the step of each."""
    with np.errstate(over="ignore", invalid="ignore"):  # of a damaged file
        found: Words = (codes.astype(np.float32) * per).view(np.uint32)
    found[codes == NEGATIVE_ZERO] = _SIGN
    return found


def divides(length: int, mask: Mask) -> bool:
    """Whether a tensor can be cut into such runs."""
    return length == mask.size or (length >= LEAST and mask.size % length == 0)


def counts_of(mask: Mask, length: int) -> NDArray[np.int64]:
    """How many elements are set in each run. `length` divides it."""
    found: NDArray[np.int64] = mask.reshape(-1, length).sum(1, dtype=np.int64)
    return found


def _lengths(shape: tuple[int, ...]) -> Iterator[int]:
    """Longest first: fewer steps to write."""
    yield prod(shape)
    row = prod(shape[1:])
    if len(shape) > 1 and LEAST <= row < prod(shape):
        yield row
        yield from (length for length in GROUPS if length < row and row % length == 0)


def _steps(values: Floats, counts: NDArray[np.int64]) -> Floats | None:
    """A step for each run, of `counts` elements each, so that all are multiples; None where a run has none."""
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    tops = np.maximum.reduceat(np.abs(values), starts)
    probes = values[starts[:, None] + np.arange(PROBES) * counts[:, None] // PROBES]
    found = np.zeros(len(counts), np.float32)
    numbers = _search(values, starts, counts, tops, probes, found, np.arange(min(FIRST, len(counts))), _candidates())
    if numbers is None:
        return None
    # The runs behind them mostly have the numbers of the first ones.
    rest = np.arange(FIRST, len(counts))
    likely = sorted(set(numbers))
    others = [one for one in _candidates() if one not in likely]
    return None if _search(values, starts, counts, tops, probes, found, rest, [*likely, *others]) is None else found


def _candidates() -> list[tuple[int, int]]:
    """By how much the largest is divided, and how many float32 further its quotient is; coarse grids first."""
    return [(number, off) for number in range(1, MOST + 1) for off in (0, -1, 1)]


def _search(
    values: Floats,
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    tops: Floats,
    probes: Floats,
    found: Floats,
    open_: NDArray[np.int64],
    candidates: list[tuple[int, int]],
) -> list[tuple[int, int]] | None:
    """Writes the steps of the runs `open_` to `found`; returns which candidates they were, None where one has none."""
    used = []
    for number, off in candidates:
        if not len(open_):
            break
        steps = _quotients(tops[open_], number, off)
        likely = np.flatnonzero(_on_grid(probes[open_], steps[:, None]).all(1))
        fits = np.zeros(len(open_), np.bool_)
        fits[likely] = [_all_on_grid(values, starts[open_[i]], counts[open_[i]], steps[i]) for i in likely]
        found[open_[fits]] = steps[fits]
        if fits.any():
            used.append((number, off))
        open_ = open_[~fits]
    return None if len(open_) else used


def _all_on_grid(values: Floats, start: np.int64, count: np.int64, step: np.float32) -> bool:
    return bool(_on_grid(values[start : start + count], step).all())


def _quotients(tops: Floats, number: int, off: int) -> Floats:
    steps: Floats = tops / np.float32(number)
    if off:
        steps = np.nextafter(steps, np.float32(np.inf if off > 0 else 0))
    return np.where(steps > 0, steps, np.float32(1))  # zeros alone fit any


def _on_grid(values: Floats, steps: Floats | np.float32) -> NDArray[np.bool_]:
    with np.errstate(over="ignore"):
        codes = np.rint(values / steps)
        return np.asarray((codes * steps == values) & (np.abs(codes) <= MOST))
