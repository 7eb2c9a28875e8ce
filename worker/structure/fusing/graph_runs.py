"""What the nodes of a graph give for inputs of several sizes: shapes, strides and dtypes, without the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from worker.data.batch import Inputs


@dataclass(frozen=True)
class Given:
    """What a node gives: a tensor's layout, or the type and value of something else."""

    shape: tuple[int, ...] | None
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    value: Any = None

    @property
    def contiguous(self) -> bool:
        """In the order of its places, without gaps."""
        wanted, sizes = 1, self.shape or ()
        for size, step in zip(reversed(sizes), reversed(self.stride), strict=True):
            if size != 1 and step != wanted:
                return False
            wanted *= size
        return True


class Runs:
    """Of a module for each of some inputs; two nodes are alike where they are for all of them."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Inputs]) -> None:
        self._of = [_run(module, one) for one in inputs]

    def of(self, node: fx.Node) -> list[Given]:
        """What a node gives, one entry for each of the inputs."""
        return [own[node] for own in self._of if node in own]

    def same_shape(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether both are tensors of one shape and dtype."""
        pairs = list(zip(self.of(one), self.of(other), strict=True))
        return all(a.shape is not None and (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)

    def same_layout(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether they lie alike as well."""
        pairs = zip(self.of(one), self.of(other), strict=True)
        return self.same_shape(one, other) and all(a.stride == b.stride for a, b in pairs)


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, Given] = {}

    def run_node(self, n: fx.Node) -> Any:
        given = super().run_node(n)
        if isinstance(given, Tensor):
            self.found[n] = Given(tuple(given.shape), given.stride(), given.dtype)
        else:
            self.found[n] = Given(None, value=given if isinstance(given, int | float | bool) else None)
        return given


def _run(module: fx.GraphModule, inputs: Inputs) -> dict[fx.Node, Given]:
    recorder = _Recorder(module)
    with torch.no_grad():
        recorder.run(*inputs)
    return recorder.found
