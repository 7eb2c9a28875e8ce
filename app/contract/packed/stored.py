"""A tensor as its bits: what is packed and what comes back, equal bit for bit whatever the dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.unsignedinteger]

# Names of safetensors with bytes an element. The order is the format's: a dtype is written as its place.
DTYPES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
FLOATS = ("F16", "BF16", "F32", "F64")
WORDS: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Stored:
    """`words` are the elements' bit patterns in row-major order, [number of elements], of an unsigned dtype as wide."""

    dtype: str
    shape: tuple[int, ...]
    words: Words

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"there is no dtype {self.dtype}; there are {', '.join(DTYPES)}")
        if self.words.dtype != WORDS[DTYPES[self.dtype]] or self.words.shape != (math.prod(self.shape),):
            raise ValueError(f"{self.dtype} of shape {self.shape} is not {self.words.dtype} of {self.words.shape}")

    @classmethod
    def of(cls, array: NDArray[np.generic]) -> Stored:
        """A NumPy array; bfloat16 and float8 have none."""
        kind = {"f": "F", "i": "I", "u": "U"}.get(array.dtype.kind)
        name = "BOOL" if array.dtype == np.bool_ else f"{kind}{array.dtype.itemsize * 8}"
        if name not in DTYPES:
            raise ValueError(f"a NumPy array of {array.dtype} cannot be packed")
        flat = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)).reshape(-1)
        return cls(name, array.shape, flat.view(WORDS[array.dtype.itemsize]))

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    def tobytes(self) -> bytes:
        """Little endian, as in safetensors."""
        return self.words.astype(self.words.dtype.newbyteorder("<"), copy=False).tobytes()


def floats_of(words: Words, dtype: str) -> NDArray[np.float32]:
    """The values of words of F32, F16 or BF16."""
    if dtype == "BF16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "F16":
        return words.view(np.float16).astype(np.float32)
    return words.view(np.float32)


def words_of_floats(values: NDArray[np.float32], dtype: str) -> Words:
    """The words of F32, F16 or BF16 nearest to values, ties to even; numbers that are too large become infinite."""
    bits = values.view(np.uint32)
    if dtype == "BF16":
        return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float16).view(np.uint16)
    return bits
