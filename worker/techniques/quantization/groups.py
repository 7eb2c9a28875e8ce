"""How many neighbouring weights of an output share a step, and how many weights are rounded at once."""

from __future__ import annotations

import math

from torch import nn

from app.contract.weight_only import LEAST_GROUP, WeightOnly

AT_ONCE = 1 << 15  # weights: few enough for the cache, and for torch to leave them to one thread


def group_of(step: WeightOnly, layer: nn.Module, columns: int) -> int:
    """How many columns of a layer's matrix share a step."""
    if step.group_size is None or isinstance(layer, nn.Conv1d | nn.Conv2d):
        return columns
    size = math.gcd(step.group_size, columns)
    return size if size >= LEAST_GROUP else columns
