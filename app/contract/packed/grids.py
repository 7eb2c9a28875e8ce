"""Rows and columns sorted into classes, so that a bitmap is as even as can be where two classes meet."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Classes = NDArray[np.int64]
Bits = NDArray[np.bool_]

NUMBERS = ((2, 2), (1, 4), (4, 1), (4, 4), (8, 8), (12, 12))  # of classes of rows and of columns that are tried
ROUNDS = 6  # of moving rows and columns to where they fit best; few move after three
LARGE = 1 << 23  # of more elements no classes are sought: what they state is nothing beside what it costs to find them


def grids(rows: Bits, most: int) -> Iterator[tuple[Classes, Classes]]:
    """Ways to sort the rows and columns [height, width], from no classes at all to many; no class is empty."""
    yield np.zeros(rows.shape[0], np.int64), np.zeros(rows.shape[1], np.int64)
    if rows.size > LARGE or min(rows.shape) == 0:
        return
    elements = rows.astype(np.float32)
    for high, wide in NUMBERS:
        if high <= rows.shape[0] and wide <= rows.shape[1]:
            yield _sorted(elements, min(high, most), min(wide, most))


def _sorted(elements: NDArray[np.float32], high: int, wide: int) -> tuple[Classes, Classes]:
    row_class, column_class = _by_density(elements.sum(1), high), _by_density(elements.sum(0), wide)
    for _ in range(ROUNDS):
        row_class = _fitting(elements, row_class, column_class, high, wide)
        column_class = _fitting(elements.T, column_class, row_class, wide, high)
    return _numbered(row_class), _numbered(column_class)


def _by_density(counts: NDArray[np.float32], number: int) -> Classes:
    """The first guess: those with nothing, then classes of nearly equal numbers by how much they have."""
    if number == 1:
        return np.zeros(len(counts), np.int64)
    order = np.argsort(np.argsort(counts, kind="stable"), kind="stable")
    dead = int((counts == 0).sum())
    alive = max(1, len(counts) - dead)
    found = 1 + (order - dead) * (number - 1) // alive
    return np.where(counts == 0, 0, np.clip(found, 1, number - 1)).astype(np.int64)


def _fitting(elements: NDArray[np.float32], own: Classes, others: Classes, number: int, of_others: int) -> Classes:
    """Each row in the class in which it takes the fewest bits, the name of the class included."""
    member = np.eye(of_others, dtype=np.float32)[others]
    ones = elements @ member  # [rows, classes of columns]
    cells = member.sum(0)
    mine = np.eye(number, dtype=np.float32)[own]
    size = mine.sum(0)
    chance = (mine.T @ ones) / np.maximum(size[:, None] * cells, 1)
    chance = np.clip(chance, 1e-9, 1 - 1e-7)
    with np.errstate(divide="ignore"):
        named = -np.log2(size / len(own))
    bits = -(ones @ np.log2(chance).T + (cells - ones) @ np.log2(1 - chance).T) + named
    best: Classes = np.argmin(bits, axis=1)
    return best


def _numbered(classes: Classes) -> Classes:
    """Without the numbers that no one has."""
    found: Classes = np.unique(classes, return_inverse=True)[1]
    return found
