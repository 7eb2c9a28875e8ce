"""Packed artifacts as tensors of torch. `load` needs numpy, constriction and torch, and nothing else of the worker:

from worker.packed import load
model.load_state_dict(load("model.tsr"))
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from app.contract.packed import Sizes, Stored, pack, unpack
from app.contract.packed.container import MAX_BYTES
from app.contract.packed.stored import WORDS

_DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}


def load(path: str | PathLike[str], max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """The tensors of a packed artifact by name, on the CPU, bit for bit.

    Raises Damaged, with a sentence, for a file that is none, was damaged, or holds more than `max_bytes` of tensors.
    """
    return {name: _tensor(stored) for name, stored in unpack(Path(path).read_bytes(), max_bytes).items()}


def packed(tensors: Mapping[str, Tensor]) -> tuple[bytes, Sizes]:
    """The bytes of a packed artifact, and what they are for. Raises ValueError for a dtype that it cannot hold."""
    return pack({name: _stored(name, tensor) for name, tensor in tensors.items()})


def _stored(name: str, tensor: Tensor) -> Stored:
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
        raise ValueError(f"{name} is {tensor.dtype} ({tensor.layout}), which a packed artifact cannot hold")
    # A view in integers as wide: numpy has neither bfloat16 nor float8.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    words = flat.view(torch.uint8).numpy().view(WORDS[tensor.element_size()])
    return Stored(_DTYPES[tensor.dtype], tuple(tensor.shape), words)


def _tensor(stored: Stored) -> Tensor:
    dtype = _TORCH[stored.dtype]
    return torch.from_numpy(stored.words.view("uint8")).view(dtype).reshape(stored.shape)
