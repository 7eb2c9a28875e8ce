"""What arrays hold, chunk by chunk: that inputs are finite, and what targets are by their dtype and shape.

integer [n]                                       classes
floating point [n, …]                             values
bool or uint8 [n, k] of 0 and 1                   values, of several labels at once
signed integer [n, t] beside an input [n, t, …]   tags, one a step; -100 marks a step that does not count
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.contract.errors import DatasetRejected
from worker.data.batch import IGNORED

Array: TypeAlias = NDArray[Any]

CHUNK_BYTES = 16 << 20  # read at a time


def check_finite(name: str, array: Array) -> None:
    """Raises DatasetRejected where a floating point array holds NaN or infinity, naming the first such sample."""
    if array.dtype.kind != "f":
        return
    for start, chunk in _chunks(array):
        bad = ~np.isfinite(chunk.reshape(len(chunk), -1)).all(axis=1)
        if bad.any():
            raise DatasetRejected(f"`{name}` holds NaN or infinity, first in sample {start + int(bad.argmax())}.")


def check_targets(split: str, targets: Array, inputs: Sequence[Array]) -> dict[str, Any]:
    """The fields of SplitFacts that describe the targets. Raises DatasetRejected where they are none that is known."""
    samples, name = len(inputs[0]), f"{split}_targets"
    if targets.ndim and len(targets) != samples:
        raise DatasetRejected(f"Split {split!r} has {samples} inputs and {len(targets)} targets.")
    kind, dimensions = targets.dtype.kind, targets.ndim
    if kind in "iu" and dimensions == 1:
        low, high = _range(targets)
        return {"targets": "classes", "target_min": low, "target_max": high}
    if kind == "f" and dimensions >= 1 and targets.size:
        check_finite(name, targets)
        return {"targets": "values", "target_shape": targets.shape[1:], "binary": _is_binary(targets)}
    if targets.dtype.name in ("bool", "uint8") and dimensions == 2 and targets.size and _is_binary(targets):
        return {"targets": "values", "target_shape": targets.shape[1:], "binary": True}
    if kind == "i" and dimensions == 2 and targets.size and any(own.shape[1:2] == targets.shape[1:] for own in inputs):
        return _tag_facts(name, targets)
    raise DatasetRejected(
        f"`{name}` is {targets.dtype.name} of shape {list(targets.shape)}; expected are class numbers, an integer "
        f"array of shape [{samples}] (for one-hot rows: .argmax(1)), or values as float32 (also several labels at "
        "once, 0 or 1, as float32, uint8 or bool), or tags, an int64 array with one number for each step of the input."
    )


def _tag_facts(name: str, targets: Array) -> dict[str, Any]:
    counted = [chunk[chunk != IGNORED] for _, chunk in _chunks(targets)]
    lows, highs = [int(c.min()) for c in counted if c.size], [int(c.max()) for c in counted if c.size]
    if min(lows, default=0) < 0:
        raise DatasetRejected(f"`{name}` holds {min(lows)}; tags start at 0, and {IGNORED} marks what does not count.")
    return {"targets": "tags", "target_min": min(lows, default=None), "target_max": max(highs, default=None)}


def _range(array: Array) -> tuple[int, int]:
    ends = [(int(chunk.min()), int(chunk.max())) for _, chunk in _chunks(array)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _is_binary(array: Array) -> bool:
    return all(bool(((chunk == 0) | (chunk == 1)).all()) for _, chunk in _chunks(array))


def _chunks(array: Array) -> Iterator[tuple[int, Array]]:
    rows = max(1, CHUNK_BYTES * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]
