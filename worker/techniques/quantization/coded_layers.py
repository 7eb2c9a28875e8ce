"""Layers of torch whose weights are stored in few bits and become floats where they are used, by operators of torch
alone: an exported program holds the codes, and whoever loads it needs nothing else.

Codes lie side by side in the bits of bytes, an output a row; three bits as two and one, in planes of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.constraints import owners
from worker.techniques.pruning.inputs import matrix, rows_by_output
from worker.techniques.pruning.weights import PrunableWeight, has_inputs_first, prunable
from worker.techniques.quantization.stored import StoredWeight, packed_bits, unpacked
from worker.techniques.quantization.weight_grid import WeightGrid

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}  # bits that lie together, the lowest first
IN_A_BYTE = 8
SUFFIX = "_codes"  # what follows the weight's name


@dataclass(frozen=True)
class Coded:
    """A weight of a program: where its codes lie (the module's path), of how many bits, in groups of how many columns,
    and the shape that it has as floats."""

    path: str
    bits: int
    group: int
    shape: tuple[int, ...]

    def read(self, name: str, tensors: Mapping[str, Tensor]) -> StoredWeight:
        """The weight as a program's tensors hold it, as a matrix. Raises KeyError where they do not."""
        codes, step = tensors[f"{self.path}.codes"].numpy(), tensors[f"{self.path}.step"].float().numpy()
        zero = tensors[f"{self.path}.zero"].float().numpy()
        outputs, groups = step.shape
        columns = groups * self.group
        parts = np.split(codes, np.cumsum([_row_bytes(columns, bits) for bits in PLANES[self.bits]])[:-1], axis=1)
        values, low = np.zeros((outputs, columns), np.uint8), 0
        for part, bits in zip(parts, PLANES[self.bits], strict=True):
            values |= unpacked(part, bits)[:, :columns] << low
            low += bits
        grouped = values.reshape(outputs, groups, self.group)
        return StoredWeight(
            name, grouped, scale=step[..., None], zero_point=zero[..., None], columns=columns, few_bits=self.bits
        )


class Codes(nn.Module):
    """Buffers `codes` (uint8) [outputs, bytes], and `step` and `zero` [outputs, groups]; calling it gives the weight,
    in float32, as the dtype of the steps holds it."""

    codes: Tensor
    step: Tensor
    zero: Tensor

    def __init__(self, weight: PrunableWeight, grid: WeightGrid, dtype: torch.dtype) -> None:
        super().__init__()
        rows = matrix(weight, weight.value()).cpu()
        codes, zeros = grid.unsigned(rows)
        exact = grid.zero if grid.rest() is not None else zeros
        self.register_buffer("codes", torch.from_numpy(_packed(codes.numpy(), grid.bits)))
        self.register_buffer("step", grid.step.to(dtype))
        self.register_buffer("zero", exact)
        self.bits, self.columns = grid.bits, rows.shape[1]
        self.shape = tuple(weight.value().shape)
        self._inputs_first = has_inputs_first(weight.owner)
        self._by_output = tuple(weight.by_output(torch.empty(self.shape, device="meta")).shape)

    def forward(self) -> Tensor:
        rows = self._floats(self.codes, self.step, self.zero)
        by_output = rows_by_output(rows, self._by_output)
        return by_output.transpose(0, 1) if self._inputs_first else by_output

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of a table [..., columns]."""
        return self._floats(*(functional.embedding(ids, part) for part in (self.codes, self.step, self.zero)))

    def _floats(self, codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
        """[..., columns] of bytes [..., bytes] and of [..., groups]."""
        values, start, low = None, 0, 0
        for bits in PLANES[self.bits]:
            end = start + _row_bytes(self.columns, bits)
            part = _spread(codes[..., start:end], bits)[..., : self.columns] << low
            values = part if values is None else values | part
            start, low = end, low + bits
        assert values is not None
        grouped = values.unflatten(-1, (step.shape[-1], -1)).to(torch.float32)
        found = (grouped - zero.to(torch.float32).unsqueeze(-1)) * step.to(torch.float32).unsqueeze(-1)
        return found.to(step.dtype).to(torch.float32).flatten(-2)


def with_codes(
    module: nn.Module, grids: Mapping[str, WeightGrid], dtypes: Mapping[str, torch.dtype]
) -> tuple[nn.Module, dict[str, Coded]]:
    """A module that gives what `module` gives and shares all of its tensors but the weights in `grids`, which lie on
    them: of those it holds codes, and steps of the dtypes that the upload has."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin = copy.deepcopy(module, shared)
    found: dict[str, Coded] = {}
    for weight in prunable(twin):
        if weight.name not in grids:
            continue
        grid, parameter = grids[weight.name], weight.owner.get_parameter(weight.attribute)
        codes = Codes(weight, grid, dtypes.get(weight.name, torch.float32))
        path = f"{weight.name}{SUFFIX}"
        found[weight.name] = Coded(path, grid.bits, grid.group, codes.shape)
        for _, owner, attribute in list(owners(twin, parameter)):
            _put(owner, attribute, codes)
    return twin, found


def _put(layer: nn.Module, attribute: str, codes: Codes) -> None:
    """Codes in the place of a parameter: reading the attribute makes floats of them, and of a table of what is looked
    up alone."""
    del layer._parameters[attribute]
    layer.add_module(f"{attribute}{SUFFIX}", codes)
    kind = type(layer)
    own = {attribute: property(lambda layer: codes()), "__module__": kind.__module__}
    layer.__class__ = type(kind.__name__, (kind,), own)
    if isinstance(layer, nn.Embedding):
        setattr(layer, "forward", codes.look_up)  # noqa: B010 - of this one, and not of its class


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """[outputs, bytes] of codes [outputs, columns], plane by plane; a row of a plane ends with a whole byte."""
    columns, planes, low = codes.shape[1], [], 0
    for width in PLANES[bits]:
        own = codes >> low & (1 << width) - 1
        padding = _row_bytes(columns, width) * IN_A_BYTE // width - columns
        planes.append(packed_bits(np.pad(own, ((0, 0), (0, padding))), width))
        low += width
    return np.concatenate(planes, 1)


def _row_bytes(columns: int, bits: int) -> int:
    return -(-columns * bits // IN_A_BYTE)


def _spread(values: Tensor, bits: int) -> Tensor:
    """[..., 8 / bits * n] of bytes [..., n], from the lowest bits on."""
    if bits == IN_A_BYTE:
        return values
    parts = [values >> shift & (1 << bits) - 1 for shift in range(0, IN_A_BYTE, bits)]
    return torch.stack(parts, -1).flatten(-2)
