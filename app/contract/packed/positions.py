"""Where the nonzero elements of a tensor are: a bitmap, coded by what is known of its rows, columns, groups or blocks.

Four kinds, of which the shortest is written:
- every element, or none: one byte;
- grid: rows and columns are sorted into classes of like density, and each pair of classes has its own probability, so
  that dead rows and columns cost next to nothing (co-clustering after Dhillon, Mallela & Modha 2003);
- groups of m along an axis: how many of each group, then which, so that n:m sparsity costs log2(m choose n) a group;
- blocks of a x b along the first two axes: the bitmap of the blocks, itself of one of the kinds above.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import comb, log2, prod

import numpy as np
from numpy.typing import NDArray

from app.contract.packed import models
from app.contract.packed.coder import CHUNK
from app.contract.packed.draft import Draft, Source
from app.contract.packed.grids import LARGE, grids
from app.contract.packed.wire import Damaged

Mask = NDArray[np.bool_]
Shape = tuple[int, ...]

ALL, NONE, GRID, GROUPS, BLOCKS = range(5)
MOST_CLASSES = 16
MOST_GROUP = 64
MOST_BLOCK = 64
GROUP_SIZES = (4, 8, 16, 32)
FULL = 0.98  # of the elements in the blocks that are kept have to be nonzero, or blocks are not what was pruned


def write(mask: Mask, draft: Draft, nested: bool = False) -> Mask:
    """Writes a mask, `nested` that of blocks, which are in no blocks again; returns the elements that values have to be
    given for, which may be a few more than it has."""
    kept = mask
    best = _flat(mask)
    if best is None:
        best = min(_grid_drafts(mask), key=_bits)  # one at a time: each is as long as the tensor
        best = min([best, *_group_drafts(mask, best.bits)], key=_bits)
        if not nested and (sides := _sides(mask)) is not None:
            blocks: Mask = np.logical_or.reduce(_blocked(mask, *sides), (1, 3))
            inner = Draft()
            inner.header.raw(bytes([BLOCKS, *sides]))
            write(blocks, inner, nested=True)
            # What it saves here it may cost in values: only whole blocks are worth it.
            whole = _spread(blocks, sides, mask.shape)
            if mask.sum() >= FULL * whole.sum() and inner.bits < best.bits:
                draft.extend(inner)
                return whole
    draft.extend(best)
    return kept


def read(shape: Shape, source: Source, nested: bool = False) -> Mask:
    """The mask of a tensor of `shape`. Raises Damaged."""
    match source.header.byte():
        case kind if kind in (ALL, NONE):
            return np.full(shape, kind == ALL)
        case _ if not prod(shape):
            pass
        case kind if kind == GRID:
            return _read_grid(shape, source)
        case kind if kind == GROUPS:
            return _read_groups(shape, source)
        case kind if kind == BLOCKS and not nested and len(shape) >= 2:
            sides = _side(shape[0], source), _side(shape[1], source)
            return _spread(read(_of_blocks(shape, sides), source, True), sides, shape)
    raise Damaged(
        "The places of a tensor are written in a way that this version does not know, or the file is damaged."
    )


def _bits(draft: Draft) -> float:
    return draft.bits


def _flat(mask: Mask) -> Draft | None:
    if mask.any() and not mask.all():
        return None
    draft = Draft()
    draft.header.raw(bytes([ALL if mask.any() else NONE]))
    return draft


def _grid_drafts(mask: Mask) -> Iterator[Draft]:
    for axis in range(1, max(2, mask.ndim)):
        rows = mask.reshape(prod(mask.shape[:axis]), -1) if mask.ndim > 1 else mask.reshape(1, -1)
        for row_class, column_class in grids(rows, MOST_CLASSES):
            draft = Draft()
            draft.header.raw(bytes([GRID]))
            draft.header.number(axis)
            _write_grid(rows, row_class, column_class, draft)
            yield draft


def _write_grid(rows: Mask, row_class: NDArray[np.integer], column_class: NDArray[np.integer], draft: Draft) -> None:
    for classes in (row_class, column_class):
        counts = np.bincount(classes)
        draft.header.number(len(counts) - 1)
        if len(counts) > 1:
            bytes_ = models.quantized(counts)
            draft.header.raw(bytes_.tobytes())
            draft.coded.put(classes, models.probabilities(bytes_))
    for i in range(int(row_class.max()) + 1):
        own = rows[row_class == i]
        for j in range(int(column_class.max()) + 1):
            block = own[:, column_class == j].reshape(-1)
            byte = models.coin(int(block.sum()), len(block))
            draft.header.raw(bytes([byte]))
            if byte not in (models.NEVER, models.ALWAYS):
                draft.coded.put(block.astype(np.int32), models.coin_probabilities(byte))


def _read_grid(shape: Shape, source: Source) -> Mask:
    axis = source.header.number(max(1, len(shape) - 1))
    height = prod(shape[:axis]) if len(shape) > 1 else 1
    mask = np.zeros((height, prod(shape) // height), np.bool_)
    row_class, column_class = _read_classes(height, mask, source), _read_classes(mask.shape[1], mask, source)
    if row_class is None and column_class is None:
        _read_whole(mask.reshape(-1), source)
        return mask.reshape(shape)
    row_class, column_class = (
        np.zeros(side, np.int32) if classes is None else classes
        for side, classes in zip(mask.shape, (row_class, column_class), strict=True)
    )
    for i in range(int(row_class.max()) + 1):
        for j in range(int(column_class.max()) + 1):
            _read_pair(mask, np.flatnonzero(row_class == i), np.flatnonzero(column_class == j), source)
    return mask.reshape(shape)


def _read_whole(flat: Mask, source: Source) -> None:
    """All elements, of which nothing is known but how many are set."""
    byte = source.header.byte()
    if byte in (models.NEVER, models.ALWAYS):
        flat[:] = byte == models.ALWAYS
        return
    for part, bits in source.coded.chunks(flat.size, models.coin_probabilities(byte)):
        flat[part] = bits


def _read_classes(count: int, mask: Mask, source: Source) -> NDArray[np.integer] | None:
    """The class of each row or column of the mask; None where there is one alone."""
    number = source.header.number(MOST_CLASSES - 1) + 1
    if number == 1:
        return None
    if mask.size > LARGE:
        raise Damaged("A tensor is too large to have classes of rows. The file is damaged: fetch it again.")
    bytes_ = np.frombuffer(source.header.raw(number), np.uint8)
    classes = source.coded.take(count, models.probabilities(bytes_))
    if classes.max() + 1 != number:
        raise Damaged("A class of rows or columns is missing. The file is damaged: fetch it again.")
    return classes


def _read_pair(mask: Mask, rows: NDArray[np.intp], columns: NDArray[np.intp], source: Source) -> None:
    """The elements at some rows and columns, row by row."""
    byte = source.header.byte()
    if byte == models.NEVER:
        return
    if byte == models.ALWAYS:
        mask[np.ix_(rows, columns)] = True
        return
    chances = models.coin_probabilities(byte)
    at_once = max(1, CHUNK // max(1, len(columns)))
    for start in range(0, len(rows), at_once):
        some = rows[start : start + at_once]
        bits = np.empty(len(some) * len(columns), np.bool_)
        for part, symbols in source.coded.chunks(len(bits), chances):
            bits[part] = symbols
        mask[np.ix_(some, columns)] = bits.reshape(len(some), -1)


def _group_drafts(mask: Mask, bits: float) -> Iterator[Draft]:
    """Those that take fewer bits than that."""
    for axis in range(min(2, mask.ndim)):
        for size in GROUP_SIZES:
            if mask.shape[axis] % size:
                continue
            groups = np.moveaxis(mask, axis, -1).reshape(-1, size)
            if _group_bits(np.bincount(groups.sum(1), minlength=size + 1)) < bits:
                draft = Draft()
                draft.header.raw(bytes([GROUPS, axis, size]))
                _write_groups(groups, draft)
                yield draft


def _group_bits(counts: NDArray[np.integer]) -> float:
    """What groups take where `counts[n]` of them have n elements: how many, and which."""
    size, total = len(counts) - 1, counts.sum()
    which = sum(int(own) * log2(comb(size, n)) for n, own in enumerate(counts))
    return which + float(sum(own * log2(total / own) for own in counts.tolist() if own))


def _write_groups(groups: Mask, draft: Draft) -> None:
    size = groups.shape[1]
    counts = groups.sum(1)
    known = np.unique(counts)
    draft.header.number(len(known) - 1)
    draft.header.raw(known.astype(np.uint8).tobytes())
    if len(known) > 1:
        bytes_ = models.quantized(np.bincount(np.searchsorted(known, counts)))
        draft.header.raw(bytes_.tobytes())
        chances = models.probabilities(bytes_)
    for start in range(0, len(groups), CHUNK):
        own, left = groups[start : start + CHUNK], counts[start : start + CHUNK].copy()
        if len(known) > 1:
            draft.coded.put(np.searchsorted(known, left), chances)
        for place in range(size):
            for count in range(1, size - place):
                if len(bits := own[left == count, place]):
                    draft.coded.put(bits.astype(np.int32), _next(count, size - place))
            left -= own[:, place]


def _read_groups(shape: Shape, source: Source) -> Mask:
    axis, size = source.header.byte(), source.header.byte()
    if axis >= len(shape) or not 0 < size <= MOST_GROUP or shape[axis] % size:
        raise Damaged("Groups do not fit their tensor. The file is damaged: fetch it again.")
    number = source.header.number(size) + 1
    known = np.frombuffer(source.header.raw(number), np.uint8).astype(np.int64)
    if known.max() > size:
        raise Damaged("A group has more elements than it has places. The file is damaged: fetch it again.")
    groups = np.zeros((prod(shape) // size, size), np.bool_)
    if number > 1:
        chances = models.probabilities(np.frombuffer(source.header.raw(number), np.uint8))
    for start in range(0, len(groups), CHUNK):
        own = groups[start : start + CHUNK]
        left = np.full(len(own), known[0])
        if number > 1:
            left = known[source.coded.take(len(own), chances)]
        for place in range(size):
            own[:, place] = left == size - place
            for count in range(1, size - place):
                if len(at := np.flatnonzero(left == count)):
                    own[at, place] = source.coded.take(len(at), _next(count, size - place))
            left -= own[:, place]
    moved = tuple(side for place, side in enumerate(shape) if place != axis)
    return np.ascontiguousarray(np.moveaxis(groups.reshape(*moved, shape[axis]), -1, axis))


def _next(count: int, places: int) -> NDArray[np.float64]:
    """Whether the next of `places` is one of `count` that are left, all being alike."""
    return np.array([(places - count) / places, count / places])


def _sides(mask: Mask) -> tuple[int, int] | None:
    """The sides of the largest blocks that are all or nothing, more or less; None where they are single elements."""
    if mask.ndim < 2:
        return None
    sides = (_longest(mask), _longest(mask.swapaxes(0, 1)))
    return None if sides == (1, 1) else sides


def _longest(mask: Mask) -> int:
    """Along the first axis."""
    for side in (64, 48, 32, 24, 16, 12, 8, 6, 5, 4, 3, 2):
        if mask.shape[0] % side == 0:
            runs = mask.reshape(-1, side, *mask.shape[1:])
            if mask.sum() >= FULL * side * runs.any(1).sum():
                return side
    return 1


def _blocked(mask: Mask, high: int, wide: int) -> Mask:
    rows, columns, *rest = mask.shape
    return mask.reshape(rows // high, high, columns // wide, wide, *rest)


def _of_blocks(shape: Shape, sides: tuple[int, int]) -> Shape:
    return (shape[0] // sides[0], shape[1] // sides[1], *shape[2:])


def _spread(blocks: Mask, sides: tuple[int, int], shape: Shape) -> Mask:
    whole = np.repeat(np.repeat(blocks, sides[0], 0), sides[1], 1)
    assert whole.shape == shape
    return whole


def _side(length: int, source: Source) -> int:
    side = source.header.byte()
    if not 0 < side <= MOST_BLOCK or length % side:
        raise Damaged("Blocks do not fit their tensor. The file is damaged: fetch it again.")
    return side
