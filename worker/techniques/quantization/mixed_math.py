"""What bits of a layer cost. They are chosen as a knapsack is packed (`worker.techniques.knapsack_math`): that the
losses of layers rounded one by one tell those of all together is the assumption of HAWQ (Dong, Yao, Gholami, Mahoney &
Keutzer 2019) and ZeroQ (Cai et al. 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """What a layer costs in each of a step's bits, and with floats: bytes, or nanoseconds."""

    bits: tuple[int, ...]
    floats: int

    def plus(self, other: Costs, times: int) -> Costs:
        """With so many times another one besides."""
        pairs = zip(self.bits, other.bits, strict=True)
        return Costs(tuple(own + times * more for own, more in pairs), self.floats + times * other.floats)

    def least(self, floats: bool) -> int:
        """The lowest; `floats`: of floats too."""
        return min((*self.bits, self.floats) if floats else self.bits)


def stored_bytes(outputs: int, columns: int, bits: int, group: int, zero_bits: int, step_bytes: int) -> int:
    """What a matrix takes in codes of `bits`, and for each `group` columns of an output a step of `step_bytes` and a
    zero point of `zero_bits`."""
    groups = outputs * (columns // group)
    return math.ceil(outputs * columns * bits / 8) + groups * step_bytes + math.ceil(groups * zero_bits / 8)
