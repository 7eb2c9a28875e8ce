"""What goes or stays as one: single weights, or blocks of them."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from worker.techniques.pruning.weights import PrunableWeight


class Grain(Protocol):
    """How the weights of a tensor belong together."""

    def fits(self, weight: PrunableWeight) -> bool:
        """Whether the tensor can be cut up like that."""

    def pooled(self, weight: PrunableWeight, scores: Tensor) -> Tensor:
        """The scores of the units, of those of their weights (which are of the weight's shape)."""

    def whole(self, weight: PrunableWeight, kept: Tensor) -> Tensor:
        """The units of which every weight is kept, or any: they are kept as one."""

    def spread(self, weight: PrunableWeight, units: Tensor) -> Tensor:
        """What is said of units, of each of their weights."""


class Elements:
    """Every weight is for itself."""

    def fits(self, weight: PrunableWeight) -> bool:
        return True

    def pooled(self, weight: PrunableWeight, scores: Tensor) -> Tensor:
        return scores

    def whole(self, weight: PrunableWeight, kept: Tensor) -> Tensor:
        return kept

    def spread(self, weight: PrunableWeight, units: Tensor) -> Tensor:
        return units


class Blocks:
    """Blocks of `high` outputs by `wide` inputs, at each place of a kernel."""

    def __init__(self, high: int, wide: int, norm: Literal["l1", "l2"]) -> None:
        self._high, self._wide, self._norm = high, wide, norm

    def fits(self, weight: PrunableWeight) -> bool:
        shape = weight.by_output(weight.value()).shape
        return len(shape) > 1 and shape[0] % self._high == 0 and shape[1] % self._wide == 0

    def pooled(self, weight: PrunableWeight, scores: Tensor) -> Tensor:
        blocks = self._cut(weight, scores)
        return blocks.sum((1, 3)) if self._norm == "l1" else blocks.square().sum((1, 3)).sqrt()

    def whole(self, weight: PrunableWeight, kept: Tensor) -> Tensor:
        return self._cut(weight, kept).any(3).any(1)

    def spread(self, weight: PrunableWeight, units: Tensor) -> Tensor:
        whole = units.repeat_interleave(self._high, 0).repeat_interleave(self._wide, 1)
        return weight.by_output(whole)

    def _cut(self, weight: PrunableWeight, tensor: Tensor) -> Tensor:
        """[rows of blocks, high, columns of blocks, wide, places of the kernel]."""
        outputs, inputs, *places = weight.by_output(tensor).shape
        cut = (outputs // self._high, self._high, inputs // self._wide, self._wide, *places)
        return weight.by_output(tensor).reshape(cut)


def fits_groups(weight: PrunableWeight, size: int) -> bool:
    """Whether groups of that size fit the input dimension."""
    shape = weight.by_output(weight.value()).shape
    return len(shape) > 1 and shape[1] % size == 0
