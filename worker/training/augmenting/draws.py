"""Random numbers of a batch: drawn on the CPU, so that a checkpoint knows where they stand, and moved to its device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def uniform(count: int, random: torch.Generator, device: torch.device) -> Tensor:
    """float32 [count] in [0, 1)."""
    return torch.rand(count, generator=random).to(device)


def whole(numbers: Tensor, most: Tensor | int) -> Tensor:
    """int64: whole numbers from 0 to `most`, each as likely, of uniform ones in [0, 1)."""
    return (numbers * (most + 1)).long()


def beta(alpha: float, count: int, random: torch.Generator, device: torch.device) -> Tensor:
    """float32 [count] of Beta(alpha, alpha), which torch does not draw from a generator of one's own."""
    seed = int(torch.randint(2**63 - 1, (), generator=random))
    drawn = np.random.default_rng(seed).beta(alpha, alpha, count).astype(np.float32)
    return torch.from_numpy(drawn).to(device)
