"""A batch norm with the statistics of a training is a factor and a shift for each channel, and so part of the linear
layer beside it (Jacob et al. 2018, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """x * `scale` + `shift` for each channel; float64, [channels]."""

    scale: Tensor
    shift: Tensor


def affine(mean: Tensor, variance: Tensor, gain: Tensor | None, bias: Tensor | None, eps: float) -> Affine:
    """What a batch norm does in eval mode: (x - mean) / sqrt(variance + eps) * gain + bias, each [channels]."""
    scale = (variance.double() + eps).rsqrt()
    scale = scale if gain is None else scale * gain.double()
    shift = -mean.double() * scale
    return Affine(scale, shift if bias is None else shift + bias.double())


def behind(
    weight: Tensor, bias: Tensor | None, norm: Affine, groups: int = 1, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of a layer that computes norm(layer(x)).

    `weight` is [out, in / groups, *kernel], of a Linear layer [out, in], or, `transposed`, [in, out / groups, *kernel].
    """
    kernel = [1] * (weight.ndim - 2)
    rows = weight.double()
    if transposed:
        scale = norm.scale.view(groups, 1, -1, *kernel)
        rows = (rows.unflatten(0, (groups, -1)) * scale).flatten(0, 1)
    else:
        rows = rows * norm.scale.view(-1, 1, *kernel)
    return rows, norm.shift if bias is None else norm.shift + norm.scale * bias.double()


def before(weight: Tensor, bias: Tensor | None, norm: Affine, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of a layer that computes layer(norm(x)); it pads with no zeros.

    `weight` is [out, in / groups, *kernel], of a Linear layer [out, in].
    """
    kernel = [1] * (weight.ndim - 2)
    rows = weight.double().unflatten(0, (groups, -1))  # [groups, out / groups, in / groups, *kernel]
    scale, shift = (own.view(groups, 1, -1, *kernel) for own in (norm.scale, norm.shift))
    added = (rows * shift).flatten(0, 1).flatten(1).sum(1)
    return (rows * scale).flatten(0, 1), added if bias is None else added + bias.double()


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest number in `other`; infinite between shapes."""
    if one.shape != other.shape:
        return math.inf
    if not other.numel():
        return 0.0
    gap = float((one.double() - other.double()).abs().max())
    return gap / max(float(other.double().abs().max()), 1e-30)
