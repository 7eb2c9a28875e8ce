"""Arrays: one .npz or .safetensors file with `<split>_inputs` and `<split>_targets`, memory-mapped."""

from __future__ import annotations

import re
import tempfile
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray

from app.contract.errors import DatasetRejected
from app.contract.facts import SPLITS, DatasetFacts, SplitFacts, TargetKind, TensorFacts
from worker.data.array_checks import check_finite, check_targets
from worker.data.base import Data, RawBatch, RawTargets, Split
from worker.data.splits import SplitNames
from worker.vetting.archive import Member, open_archive
from worker.vetting.safetensors import read_header

Array: TypeAlias = NDArray[Any]

INPUT = "input"  # the name of an only input
EXPECTED = (
    "Expected are the arrays `<split>_inputs` and `<split>_targets` with split train, validation, test or calibration "
    "(several inputs as `<split>_inputs.<name>`)."
)
MAX_NPY_HEADER = 10_000  # characters; plain dtypes need about 100
MAX_DIMENSIONS = 16
# By NumPy's kind and bytes an item: what torch and the models take.
_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "b1"}
_SAFETENSORS = {
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "I8": "|i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "U8": "|u1",
    "U16": "<u2",
    "U32": "<u4",
    "BOOL": "|b1",
}
# What NumPy lets through from the parsers that a damaged header meets.
_NO_HEADER = (ValueError, KeyError, SyntaxError, TypeError, EOFError, UnicodeDecodeError, tokenize.TokenError)
_NAME = re.compile(r"([a-z]+)_(inputs|targets)(?:\.(\w{1,64}))?")


@dataclass
class ArraySplit:
    """A split whose arrays lie in a file; `read` copies the rows of one batch."""

    inputs: dict[str, Array] = field(default_factory=dict)
    targets: Array | None = None
    kind: TargetKind | None = None

    @property
    def has_targets(self) -> bool:
        return self.targets is not None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def read(self, indices: Sequence[int]) -> RawBatch:
        rows = np.asarray(indices, dtype=np.int64)
        inputs = {name: torch.from_numpy(_native(array[rows])) for name, array in self.inputs.items()}
        return RawBatch(inputs, None if self.targets is None else self._targets(self.targets[rows]))

    def classes(self) -> NDArray[np.int64] | None:
        return self.targets.astype(np.int64) if self.targets is not None and self.kind == "classes" else None

    def _targets(self, rows: Array) -> RawTargets:
        if self.kind == "values":
            return torch.from_numpy(rows.astype(np.float32))
        numbers = torch.from_numpy(rows.astype(np.int64))
        return list(numbers) if self.kind == "tags" else numbers


def open_npz(path: Path, scratch: Path) -> Data:
    """Unpacks the arrays to a new folder under `scratch` and maps them. Never unpickles. Raises DatasetRejected."""
    folder = Path(tempfile.mkdtemp(prefix="arrays-", dir=scratch))
    archive = open_archive(path, folder, DatasetRejected)
    try:
        arrays = {}
        for number, (name, member) in enumerate(archive.members.items()):
            arrays[name.removesuffix(".npy")] = _map_npy(member, folder / f"{number}.npy")
    finally:
        archive.close()
    return _data(arrays)


def open_safetensors(path: Path) -> Data:
    """Maps the arrays where they lie. Raises DatasetRejected."""
    arrays = {}
    for name, entry in read_header(path, DatasetRejected).entries.items():
        if entry.dtype not in _SAFETENSORS:
            raise DatasetRejected(f"Array {name!r} has the dtype {entry.dtype}; {', '.join(_SAFETENSORS)} are taken.")
        arrays[name] = _mapped(path, np.dtype(_SAFETENSORS[entry.dtype]), entry.start, entry.shape, "C")
    return _data(arrays)


def _map_npy(member: Member, path: Path) -> Array:
    """Vets the header before anything is unpacked: an object array is a pickle."""
    with member.open() as stream:
        try:
            version = npy.read_magic(stream)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, fortran, dtype = read(stream, max_header_size=MAX_NPY_HEADER)
        except _NO_HEADER as failure:
            raise DatasetRejected(f"{member.name!r} is no NumPy array: save the file with numpy.savez.") from failure
        start = stream.tell() if stream.seekable() else _header_bytes(member)
    if dtype.hasobject:
        raise DatasetRejected(
            f"Array {member.name!r} holds Python objects (dtype object), which are pickles and are never read. "
            "Save numbers: .astype('float32') or 'int64', one array of equal rows."
        )
    if len(shape) > MAX_DIMENSIONS:
        raise DatasetRejected(f"Array {member.name!r} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are taken.")
    if f"{dtype.kind}{dtype.itemsize}" not in _DTYPES:
        raise DatasetRejected(
            f"Array {member.name!r} has the dtype {str(dtype)[:80]}; float and integer arrays are taken."
        )
    if min(shape, default=0) < 0 or start + prod(shape) * dtype.itemsize != member.size:
        raise DatasetRejected(
            f"Array {member.name!r} of shape {list(shape)} needs {prod(shape) * dtype.itemsize} bytes; "
            f"{member.size - start} came."
        )
    member.extract(path)
    return _mapped(path, dtype, start, shape, "F" if fortran else "C")


def _header_bytes(member: Member) -> int:
    """Where the data of an .npy file starts: 6 bytes of magic, 2 of version, the header's length, the header."""
    with member.open() as stream:
        head = stream.read(12)
    return 10 + int.from_bytes(head[8:10], "little") if head[6] == 1 else 12 + int.from_bytes(head[8:12], "little")


def _mapped(path: Path, dtype: np.dtype[Any], start: int, shape: tuple[int, ...], order: Any) -> Array:
    if prod(shape) == 0:  # nothing to map
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape, order=order)


def _data(arrays: Mapping[str, Array]) -> Data:
    splits: dict[str, ArraySplit] = {}
    names = SplitNames()
    for name, array in arrays.items():
        match = _NAME.fullmatch(name)
        own = None if match is None else names.split(match[1])
        if match is None or own is None:
            raise DatasetRejected(f"The file holds the array {name[:80]!r}. {EXPECTED}")
        if match[2] == "inputs" and array.dtype.kind == "b":
            raise DatasetRejected(f"Array {name!r} has the dtype bool; save inputs as uint8 or float32.")
        split = splits.setdefault(own, ArraySplit())
        if match[2] == "inputs":
            split.inputs[match[3] or INPUT] = array
        elif match[3] is None:
            split.targets = array
        else:
            raise DatasetRejected(f"{name!r}: a split has one array of targets. {EXPECTED}")
    if not splits:
        raise DatasetRejected(f"The file holds no arrays. {EXPECTED}")
    ordered = {name: splits[name] for name in SPLITS if name in splits}
    facts = {name: _facts(name, split) for name, split in ordered.items()}
    opened: dict[str, Split] = {**ordered}
    return Data(DatasetFacts(kind="arrays", splits=facts), opened)


def _facts(name: str, split: ArraySplit) -> SplitFacts:
    """Checks one split and describes it."""
    if not split.inputs:
        raise DatasetRejected(f"Split {name!r} has targets and no `{name}_inputs`. {EXPECTED}")
    for key, array in split.inputs.items():
        if array.ndim == 0 or len(array) == 0:
            raise DatasetRejected(f"`{name}_inputs` ({key}) has no samples: its shape is {list(array.shape)}.")
        if len(array) != len(split):
            raise DatasetRejected(f"The inputs of split {name!r} have {len(split)} and {len(array)} samples.")
        check_finite(f"{name}_inputs", array)
    facts = SplitFacts(
        samples=len(split),
        inputs=tuple(
            TensorFacts(name=key, shape=array.shape[1:], dtype=array.dtype.name) for key, array in split.inputs.items()
        ),
    )
    if split.targets is None:
        return facts
    found = check_targets(name, split.targets, list(split.inputs.values()))
    split.kind = found["targets"]
    return facts.model_copy(update=found)


def _native(array: Array) -> Array:
    """A contiguous copy in this machine's byte order."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
