"""Where the values of a weight lie, for exporters that store whole numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.techniques.quantization.grid_math import Grid


@dataclass(frozen=True)
class WeightGrid:
    """The grids of a weight, laid out as a matrix [outputs, columns], whose rows fall into groups of `group` columns.

    `step` and `zero` (float32) are [outputs, groups]; a weight is (code - zero) * step. Codes are of `bits` bits,
    signed where `symmetric`, when every zero is 0; else zeros are whole numbers, or, from HQQ, any.
    """

    bits: int
    group: int
    symmetric: bool
    step: Tensor
    zero: Tensor

    @classmethod
    def of(cls, grids: list[Grid], bits: int, group: int, symmetric: bool) -> WeightGrid:
        """One grid of [outputs, 1] for each group, from the left."""
        step, zero = (torch.cat([getattr(grid, part) for grid in grids], 1).float().cpu() for part in ("step", "zero"))
        return cls(bits, group, symmetric, step, zero)

    def unsigned(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The codes [outputs, columns] of a matrix that lies on the grids, and zeros [outputs, groups], as uint8.

        Signed codes are moved up by half of their range, and so is their zero. Zeros are rounded: `rest` is what that
        leaves.
        """
        outputs, columns = rows.shape
        zero = self._moved_up()
        grouped = rows.float().reshape(outputs, -1, self.group)
        codes = torch.round(grouped / self.step[..., None] + zero[..., None])
        codes = codes.clamp(0, self._most)  # a row of zeros whose step is anything
        return codes.to(torch.uint8).reshape(outputs, columns), self._whole(zero).to(torch.uint8)

    def rest(self) -> Tensor | None:
        """What is to be added to each weight of a group [outputs, groups] that was read with a rounded zero; None where
        zeros are whole numbers."""
        zero = self._moved_up()
        whole = self._whole(zero)
        return None if torch.equal(whole, zero) else (whole - zero) * self.step

    @property
    def _most(self) -> int:
        return (1 << self.bits) - 1

    def _moved_up(self) -> Tensor:
        return self.zero + (1 << self.bits - 1 if self.symmetric else 0)

    def _whole(self, zero: Tensor) -> Tensor:
        return zero.round().clamp(0, self._most)
