"""Group lasso: a penalty that makes all that hangs on a unit small together (Yuan & Lin 2006; Wen et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from worker.structure.groups import Group


class Lasso(nn.Module):
    """`strength` times the sum over units of the norm of their weights, each times the root of how many they are."""

    def __init__(self, module: nn.Module, groups: Sequence[Group], strength: float) -> None:
        super().__init__()
        self._strength = strength
        tensors = {name: own for name, own in module.named_parameters() if own.ndim > 1}
        # Not as submodules: they are the network's own.
        self._groups = [
            [(tensors[cut.parameter], cut.dim, cut.places) for cut in group.cuts if cut.parameter in tensors]
            for group in groups
        ]

    def forward(self) -> Tensor:
        """A scalar."""
        return self._strength * torch.stack([_group(own) for own in self._groups if own]).sum()


def _group(cuts: Sequence[tuple[nn.Parameter, int, Tensor]]) -> Tensor:
    squares, entries = [], 0
    for parameter, dim, places in cuts:
        own = parameter.index_select(dim, places.reshape(-1).to(parameter.device)).movedim(dim, 0)
        own = own.reshape(places.shape[0], -1)
        squares.append(own.square().sum(1))
        entries += own.shape[1]
    # The root has no gradient at 0, where a unit has been taken to.
    return sqrt(entries) * (torch.stack(squares).sum(0) + 1e-12).sqrt().sum()
