"""The tensors of a vetted program: raw bytes, or, for constants of older versions, a pickle read without running it."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from app.contract.errors import ModelRejected
from worker.vetting.boundary import first_line
from worker.vetting.pt2 import ProgramFile, StoredTensor

NARROW = frozenset({torch.float16, torch.bfloat16})


def narrow_dtypes(file: ProgramFile) -> frozenset[torch.dtype]:
    """The half-precision dtypes that a program's weights have. Raises ModelRejected for float64."""
    dtypes = {dtype_of(tensor) for tensor in file.weights.values() if tensor.is_parameter}
    if torch.float64 in dtypes:
        raise ModelRejected("The program's weights are float64: call model.float() before torch.export.export.")
    return NARROW & dtypes


def read_tensors(file: ProgramFile, narrow: frozenset[torch.dtype]) -> dict[str, Tensor]:
    """All tensors by name, those of the state dict first; the dtypes of `narrow` become float32.

    Two names of the same elements are the same object. Parameters can be trained, whatever the file says: an export for
    inference freezes them all.
    """
    found: dict[str, Tensor] = {}
    shared: dict[tuple[object, ...], Tensor] = {}
    storages: dict[str, Tensor] = {}
    for tensor in _unique([*file.weights.values(), *file.constants.values()]):
        key = (tensor.file, tensor.dtype, tensor.shape, tensor.strides, tensor.offset, tensor.is_parameter)
        if key not in shared:
            shared[key] = _finish(tensor, _read(file, tensor, storages), narrow)
        found[tensor.name] = shared[key]
    return found


def dtype_of(tensor: StoredTensor) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return dtype


def _unique(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    found = {tensor.name: tensor for tensor in tensors}
    entries = list(tensors)
    if len(found) != len(entries):
        raise ModelRejected("The program stores a weight and a constant under the same name.")
    return entries


def _read(file: ProgramFile, tensor: StoredTensor, storages: dict[str, Tensor]) -> Tensor:
    if math.prod(tensor.shape) == 0:
        return torch.empty(tensor.shape, dtype=dtype_of(tensor))
    if tensor.pickled:
        return _unpickle(file, tensor)
    if tensor.file not in storages:
        storages[tensor.file] = torch.frombuffer(bytearray(file.bytes_of(tensor.file)), dtype=torch.uint8)
    elements = storages[tensor.file].view(dtype_of(tensor))
    # A copy of its own: tensors that share only a part of their storage are not tied.
    return elements.as_strided(tensor.shape, tensor.strides, tensor.offset).clone()


def _unpickle(file: ProgramFile, tensor: StoredTensor) -> Tensor:
    try:
        value = torch.load(io.BytesIO(file.bytes_of(tensor.file)), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as failure:
        raise ModelRejected(
            f"Constant {tensor.name!r} is a pickle of more than a tensor, which would run code when read: export a "
            "model whose constants are tensors."
        ) from failure
    except Exception as failure:  # torch raises whatever its C++ parts throw
        raise ModelRejected(f"Constant {tensor.name!r} cannot be read ({first_line(failure)}).") from failure
    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_quantized
    if not plain or tuple(value.shape) != tensor.shape or value.dtype != dtype_of(tensor):
        raise ModelRejected(f"Constant {tensor.name!r} is not the plain tensor that the program says it is.")
    return value.detach().clone()


def _finish(stored: StoredTensor, tensor: Tensor, narrow: frozenset[torch.dtype]) -> Tensor:
    if tensor.dtype in narrow:
        tensor = tensor.float()
    if stored.is_parameter:
        return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    return tensor
