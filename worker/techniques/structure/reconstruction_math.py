"""The weights of a layer that come nearest to outputs that it gave, from inputs that it has now."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPINGS = (0.01, 0.1, 1.0)  # of the mean square of an input

Affine = tuple[Tensor, Tensor | None]
"""Weight [outputs, columns] and bias [outputs], where there is one."""


class Products:
    """Sums over what was seen of inputs x [columns] and of outputs y [outputs], in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.x = self.y = self.xx = self.xy = torch.zeros(1, dtype=torch.float64)

    def see(self, x: Tensor, y: Tensor) -> None:
        """Takes in [products, columns] and [products, outputs], of which each row belongs to one product."""
        x, y = x.float(), y.float()
        own = (x.sum(0), y.sum(0), x.T @ x, x.T @ y)
        sums = (self.x, self.y, self.xx, self.xy)
        self.x, self.y, self.xx, self.xy = (
            one.double() + total.to(one.device) for one, total in zip(own, sums, strict=True)
        )
        self.count += len(x)

    def __add__(self, other: Products) -> Products:
        both = Products()
        both.count = self.count + other.count
        both.x, both.y = self.x + other.x, self.y + other.y
        both.xx, both.xy = self.xx + other.xx, self.xy + other.xy
        return both


def nearest(seen: Products, held_out: Products, now: Affine) -> Affine | None:
    """What is fitted to all, with the damping by which what is fitted to `seen` comes nearest to the outputs of
    `held_out`; None where it is no nearer than `now`, and where not all that was seen is finite."""
    if not bool((seen.xx.sum() + seen.xy.sum() + held_out.xx.sum() + held_out.xy.sum()).isfinite()):
        return None
    found = {damping: error(held_out, fitted(seen, now, damping)) for damping in DAMPINGS}
    best = min(found, key=lambda damping: found[damping])
    return fitted(seen + held_out, now, best) if found[best] < error(held_out, now) else None


def fitted(moments: Products, now: Affine, damping: float) -> Affine:
    """Weight W and bias b that minimize the mean of ||y - W x - b||^2 + damping d ||W - W0||^2, d being the mean square
    of an input and W0 the weight `now`: what the inputs do not say stays as it is. Without a bias none is found. (For
    feature maps without channels that went: He, Zhang & Sun 2017.)"""
    weight, bias = now
    xx, xy = moments.xx / moments.count, moments.xy / moments.count
    x, y = moments.x / moments.count, moments.y / moments.count
    ridge = damping * float(xx.diagonal().mean()) + 1e-12
    if bias is not None:
        xx, xy = xx - torch.outer(x, x), xy - torch.outer(x, y)
    damped = xx + ridge * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    found = torch.linalg.solve(damped, xy + ridge * weight.double().T).T
    return found.to(weight.dtype), None if bias is None else (y - found @ x).to(bias.dtype)


def error(moments: Products, now: Affine) -> float:
    """The mean of ||y - W x - b||^2, less that of ||y||^2, which is the same for all weights."""
    weight = now[0].double()
    bias = weight.new_zeros(len(weight)) if now[1] is None else now[1].double()
    x, y = moments.x / moments.count, moments.y / moments.count
    squares = ((weight @ (moments.xx / moments.count)) * weight).sum()
    products = (weight.T * (moments.xy / moments.count)).sum()
    return float(squares - 2 * products + bias @ (2 * (weight @ x) - 2 * y + bias))
