"""Rounding to a grid within a network that trains: forward it rounds, backward it hands gradients on.

Learned step sizes (LSQ: Esser et al. 2020). A step is learned by its logarithm (Jain et al. 2020), so that it stays
above zero, and an optimizer like Adam moves a small one by no larger a share of itself than a large one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class _Rounded(torch.autograd.Function):
    """(clamp(round(v / s + z), low, high) - z) s. Where nothing is clipped the rounding counts for none.

    What is kept for the way back is what came in, and what is computed of it is computed again: activations are what
    fills the memory in training, and the layer in front mostly keeps just these.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(values, step, zero)
        ctx.low, ctx.high = low, high
        codes = (values.float() / step + zero).round().clamp(low, high)
        rounded: Tensor = ((codes - zero) * step + 0.0).to(values.dtype)  # never -0.0
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, step, zero = ctx.saved_tensors
        at = values.float() / step + zero
        nearest = at.round()
        codes = nearest.clamp(ctx.low, ctx.high)
        inside = nearest == codes
        of_values = torch.where(inside, gradient, 0.0) if ctx.needs_input_grad[0] else None
        of_step = None
        if ctx.needs_input_grad[1]:
            of_step = (torch.where(inside, codes - at, codes - zero) * gradient).sum_to_size(step.shape)
        return of_values, of_step, None, None, None


def rounded(values: Tensor, step: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """The nearest values on a grid, of the shape and dtype of `values`; step (above zero) and zero are of float32, and
    broadcast against them.

    The gradient of a value is that of what it became, and nothing where it was clipped; that of a step is
    round(v / s) - v / s where nothing was clipped, else the code's distance from zero (Esser et al. 2020). What lies
    within half a step of the last code was rounded to it, and not clipped.
    """
    found: Tensor = _Rounded.apply(values, step, zero, low, high)
    return found


class _Scaled(torch.autograd.Function):
    """A tensor as it is, and its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class Steps(nn.Module):
    """Steps that learn, unless they are `fixed`, and their zero points, which do not: float32 [grids]."""

    zero: Tensor

    def __init__(self, step: Tensor, zero: Tensor, low: int, high: int, *, fixed: bool = False) -> None:
        super().__init__()
        self.low, self.high = low, high
        # Weight decay leaves it alone (worker/training/groups.py): it would draw every step to 1.
        self.log_step = nn.Parameter(step.detach().float().flatten().log(), requires_grad=not fixed)
        self.register_buffer("zero", zero.detach().float().flatten())

    def values(self, each: int) -> Tensor:
        """The steps. Their gradients are made smaller by the values that each of them is for, `each`, and by the codes
        that there are, as LSQ does, since so many add up in them."""
        step: Tensor = self.log_step.exp()
        scaled: Tensor = _Scaled.apply(step, 1 / math.sqrt(max(1, each) * max(1, self.high)))
        return scaled


class FakeQuantized(Steps):
    """A parametrization: a weight [outputs, inputs, ...] on the grids of its outputs, or of groups of their inputs.

    `inputs_first` where the weight has a row for each input.
    """

    def __init__(
        self,
        step: Tensor,
        zero: Tensor,
        low: int,
        high: int,
        *,
        groups: int = 1,
        inputs_first: bool = False,
        fixed: bool = False,
    ) -> None:
        super().__init__(step, zero, low, high, fixed=fixed)
        self.groups, self.inputs_first = groups, inputs_first

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.transpose(0, 1) if self.inputs_first else weight
        parts = rows.unflatten(1, (self.groups, -1)) if self.groups > 1 else rows
        shape = (len(rows), self.groups, 1) if self.groups > 1 else (len(rows), *[1] * (rows.ndim - 1))
        step = self.values(weight.numel() // self.zero.numel()).view(shape)
        found = rounded(parts, step, self.zero.view(shape), self.low, self.high).view_as(rows)
        return found.transpose(0, 1) if self.inputs_first else found


class FakeInput(Steps):
    """What comes into a layer, on one grid of 8 bits, in whatever dtype it came."""

    def forward(self, given: Tensor) -> Tensor:
        return rounded(given, self.values(given[0].numel()), self.zero, self.low, self.high)
