"""Where a module's weights came from in the ONNX file, so that changed ones can be put back there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Select = Callable[[Tensor], Tensor]
"""Makes a parameter of the constant that a node takes by choosing and ordering its elements, never by arithmetic."""


@dataclass(frozen=True)
class Origin:
    """A parameter or buffer at `path` of the module: `select` of what node number `node` takes at `position`.

    What the node takes is a view (`shape`, `stride`, `offset`) of the tensor `source` of the file, or, where `source`
    is None, was `computed` of more than one.
    """

    path: str
    node: int
    position: int
    source: str | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    select: Select
    computed: Tensor | None = None

    def view(self, source: Tensor) -> Tensor:
        """What the node takes, as a view of the source's elements."""
        return source.as_strided(self.shape, self.stride, self.offset)


def whole(tensor: Tensor) -> Tensor:
    """The constant as it is."""
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """A matrix [in, out] as torch.nn.Linear has it, [out, in]."""
    return tensor.t()


def positions(origin: Origin) -> Tensor:
    """Which elements of what the node takes (counted row by row) the parameter has, in its own shape; int64."""
    count = torch.arange(torch.Size(origin.shape).numel())
    return origin.select(count.reshape(origin.shape))
