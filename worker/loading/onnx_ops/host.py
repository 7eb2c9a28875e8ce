"""Sizes beside tensors: what an ONNX graph computes of shapes is computed in Python numbers here.

In an ONNX graph a shape is a tensor like any other. In torch the sizes that a traced program depends on have to be
numbers (or symbols that stand for them), else a batch could not stay open. So a value of an imported graph is either a
tensor, or a *host* value: a number, or a tuple of numbers for a vector. `Shape` makes host values, arithmetic on them
keeps them, and an operator that wants a tensor makes one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor

from worker.loading.onnx_ops.errors import Unsupported

Number: TypeAlias = int | float | bool
Host: TypeAlias = Number | tuple[Any, ...]
Value: TypeAlias = Tensor | Host

MAX_HOST = 1024  # elements of a host vector; shapes and index lists are far shorter
_LARGEST = 1 << 63


def is_matrix(value: Any) -> TypeGuard[tuple[tuple[Any, ...], ...]]:
    """Whether a host value is a vector of vectors, which only moves of elements know."""
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], tuple)


def ints(value: Value) -> tuple[int, ...]:
    """A host vector, or a number as a vector of one. Raises Unsupported for a tensor: sizes must not hang on data."""
    if isinstance(value, Tensor):
        raise Unsupported("computes a size or an index list out of the data")
    numbers: Any = value if isinstance(value, tuple) else (value,)  # symbols of a trace count as whole numbers
    return tuple(numbers)


def single(value: Value) -> int:
    """A host number, or the only element of a host vector."""
    (number,) = ints(value)
    return number


def tensor(value: Value, like: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The value as a tensor on the device of `like`: int64, float32 or bool, unless `dtype` says otherwise."""
    if isinstance(value, Tensor):
        return value
    device = None if like is None else like.device
    if is_matrix(value):
        return torch.stack([tensor(row, like, dtype) for row in value])
    if dtype is None:
        first = value[0] if isinstance(value, tuple) and value else value
        dtype = torch.bool if _is(first, bool) else torch.float32 if _is(first, float) else torch.int64
    if all(_plain(number) for number in (value if isinstance(value, tuple) else (value,))):
        return torch.tensor(value, dtype=dtype, device=device)
    # Symbols: each becomes a tensor of its own, which a trace can follow.
    if isinstance(value, tuple):
        return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in value])
    return torch.full((), value, dtype=dtype, device=device)


def tensors(values: Sequence[Value]) -> list[Tensor]:
    """All as tensors, on the device of the first one that is."""
    like = next((value for value in values if isinstance(value, Tensor)), None)
    return [tensor(value, like) for value in values]


def elementwise(function: Callable[..., Number], *values: Host) -> Host:
    """A function of numbers over host values, vectors of one length (or of one element) going along."""
    vectors = [value for value in values if isinstance(value, tuple)]
    if not vectors:
        return _bounded(function(*values))
    length = max(map(len, vectors)) if min(map(len, vectors)) > 0 else 0
    columns = []
    for value in values:
        column = value if isinstance(value, tuple) else (value,)
        if len(column) not in (1, length):
            raise Unsupported("computes with vectors of different lengths")
        columns.append(column if len(column) == length else column * length)
    return tuple(_bounded(function(*row)) for row in zip(*columns, strict=True))


def concat(values: Sequence[Host]) -> tuple[Number, ...]:
    """Vectors one behind the other."""
    joined = tuple(number for value in values for number in (value if isinstance(value, tuple) else (value,)))
    if len(joined) > MAX_HOST:
        raise Unsupported("computes an index list that is too long")
    return joined


def divide(a: Number, b: Number) -> Number:
    """As ONNX divides: integers towards zero."""
    if _is(a, float) or _is(b, float):
        return a / b
    if _plain(a) and _plain(b):
        quotient = abs(a) // abs(b)
        return quotient if (a < 0) == (b < 0) else -quotient
    return a // b  # sizes are not negative


def power(a: Number, b: Number) -> Number:
    """a ** b, for exponents that shapes are computed with."""
    if not (_plain(a) and _plain(b)) or abs(b) > 64 or abs(a) > 1 << 31:
        raise Unsupported("computes a power of sizes")
    return float(a) ** float(b) if _is(a, float) or _is(b, float) or b < 0 else a**b


def cast(value: Host, dtype: torch.dtype) -> Host:
    """To bool, whole numbers (towards zero) or floats."""
    if dtype == torch.bool:
        return elementwise(bool, value)
    if dtype.is_floating_point:
        return elementwise(lambda number: number * 1.0, value)
    return elementwise(lambda number: int(number) if _plain(number) else math.trunc(number), value)


def _bounded(number: Number) -> Number:
    """A float rounded as float32 computes, a whole number within 64 bits."""
    if isinstance(number, float):
        return float(np.float32(number))
    if _plain(number) and not -_LARGEST <= number < _LARGEST:
        raise Unsupported("computes a size beyond 64 bits")
    return number


def _plain(number: Any) -> bool:
    """Whether it is a number and no symbol of a trace."""
    return isinstance(number, int | float)


def _is(number: Any, kind: type) -> bool:
    symbolic = {float: torch.SymFloat, bool: torch.SymBool, int: torch.SymInt}[kind]
    return isinstance(number, kind | symbolic)
