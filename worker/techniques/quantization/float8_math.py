"""float8 e4m3: a sign, four bits of exponent and three of mantissa, without infinities (Micikevicius et al. 2022, FP8
formats for deep learning)."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0


def row_scales(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales [rows, 1] (float32) that make the largest of each of `rows` [rows, columns] the largest float8.

    They are values of `dtype`, and never less than its smallest normal one, or float32's."""
    least = max(torch.finfo(dtype).tiny, torch.finfo(torch.float32).tiny)
    return (rows.abs().amax(1, keepdim=True) / LARGEST).to(dtype).clamp_min(least).float()


def nearest(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Each of `rows` [rows, columns] at the nearest float8 (ties to even) times its row's scale [rows, 1].

    The product is rounded to `dtype`; the result is float32."""
    codes = (rows / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return (codes.float() * scales).to(dtype).float()
