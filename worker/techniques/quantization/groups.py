"""Groups of neighbouring weights of an output that share a step: their length, and rounding them to the nearest."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from app.contract.weight_only import LEAST_GROUP, FewBits
from worker.techniques.quantization.grid_math import Grid

Fit = Callable[[Tensor], Grid]
"""The grids of groups [groups, size]."""

AT_ONCE = 1 << 15  # weights: few enough for the cache, and for torch to leave them to one thread


def group_of(step: FewBits, layer: nn.Module, columns: int) -> int:
    """How many columns of a layer's matrix share a step."""
    if step.group_size is None or isinstance(layer, nn.Conv1d | nn.Conv2d):
        return columns
    size = math.gcd(step.group_size, columns)
    return size if size >= LEAST_GROUP else columns


def nearest(weight: Tensor, group: int, fit: Fit, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Values [outputs, columns], each the nearest on its group's grid; steps, such as `dtype` has, and zero points
    [outputs, groups]."""
    found, steps, zeros = torch.empty_like(weight), [], []
    rows = max(1, AT_ONCE // weight.shape[1])
    for own, to in zip(weight.split(rows), found.split(rows), strict=True):
        parts = own.reshape(-1, group)
        grid = fit(parts).held_in(dtype)
        to.copy_(grid.rounded(parts).view_as(own))
        steps.append(grid.step.view(len(own), -1))
        zeros.append(grid.zero.view(len(own), -1))
    return found, torch.cat(steps), torch.cat(zeros)
