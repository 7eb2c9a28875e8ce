"""The header of a safetensors file, read and checked before any tensor is: the library itself is more trusting."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from app.contract.errors import TersorError

MAX_HEADER_BYTES = 8 << 20  # the largest published checkpoints have below 1 MB
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 16
MAX_NAME = 1024
PREFIX = 8  # bytes that hold the header's length, little endian

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
FLOAT8 = {"F8_E4M3": 1}


@dataclass(frozen=True)
class Entry:
    """One tensor: its bytes lie at [start, end) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file holds, by name in the header's order."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path, error: type[TersorError], *, float8: bool = False) -> Header:
    """Reads and checks the header. Raises `error` where it is oversized, no JSON, or its tensors do not fill the file.
    Tensors of `float8` are for files whose other tensors say what they are worth.

    Checked: length, duplicate keys, count, names, dtypes, shape x dtype = bytes, offsets without gap or overlap.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(PREFIX)
        if len(prefix) < PREFIX:
            raise error(f"A safetensors file has a header; this file has {size} bytes in all.")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - PREFIX):
            raise error(
                f"The safetensors header claims {length} bytes; the file has {size} and at most {MAX_HEADER_BYTES} "
                "are taken. The file is damaged or was cut short: save and upload it again."
            )
        table = _parse(stream.read(length), error)
    metadata = _metadata(table.pop("__metadata__", {}), error)
    if len(table) > MAX_TENSORS:
        raise error(f"The safetensors file holds {len(table)} tensors; at most {MAX_TENSORS} are taken.")
    known = ITEM_BYTES | (FLOAT8 if float8 else {})
    entries = {name: _entry(name, value, PREFIX + length, known, error) for name, value in table.items()}
    _check_layout(entries, PREFIX + length, size, error)
    return Header(entries, metadata)


def _parse(text: bytes, error: type[TersorError]) -> dict[str, Any]:
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, error))
    except (UnicodeDecodeError, ValueError, RecursionError) as failure:
        raise error("The safetensors header is no JSON. The file is damaged: save and upload it again.") from failure
    if not isinstance(table, dict):
        raise error("The safetensors header is no JSON object.")
    return table


def _unique(pairs: list[tuple[str, Any]], error: type[TersorError]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise error(f"The safetensors header names {twice[:80]!r} twice.")
    return table


def _metadata(value: Any, error: type[TersorError]) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise error("The safetensors metadata has to map strings to strings.")
    return value


def _entry(name: str, value: Any, base: int, known: Mapping[str, int], error: type[TersorError]) -> Entry:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise error(f"The safetensors file holds a tensor with an unusable name: {name[:80]!r}.")
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]} if len(value) == 3:
            pass
        case _:
            raise error(f"Tensor {name!r} needs dtype, shape and data_offsets in the safetensors header.")
    if dtype not in known:
        raise error(f"Tensor {name!r} has the dtype {dtype[:20]}; known are {', '.join(known)}.")
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
        raise error(f"Tensor {name!r} has the impossible shape {str(shape)[:80]}.")
    if not 0 <= start <= end or end - start != prod(shape) * known[dtype]:
        raise error(
            f"Tensor {name!r} of shape {shape} and dtype {dtype} takes {prod(shape) * known[dtype]} bytes; "
            f"the safetensors header gives it {end - start}."
        )
    return Entry(name, dtype, tuple(shape), base + start, base + end)


def _check_layout(entries: dict[str, Entry], base: int, size: int, error: type[TersorError]) -> None:
    spans = sorted((entry.start, entry.end, name) for name, entry in entries.items())
    for (_, end, name), (start, _, other) in pairwise([(base, base, "header"), *spans]):
        if start != end:
            fault = "overlap" if start < end else "leave a gap"
            raise error(f"In the safetensors file {name!r} and {other!r} {fault}.")
    end = spans[-1][1] if spans else base
    if end != size:
        raise error(
            f"The safetensors header describes {end} bytes and the file has {size}: it was cut short or has something "
            "appended. Upload it again."
        )
