"""Networks with every kind of layer that can be pruned, and samples for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Recurrent(nn.Module):
    """An embedding, an LSTM and a head, tokens in."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.lstm = nn.LSTM(16, 12, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.lstm(self.embedding(ids))[0][:, -1])
        return found


class Attention(nn.Module):
    """Self-attention over rows of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, given: Tensor) -> Tensor:
        found: Tensor = self.head(self.attention(given, given, given, need_weights=False)[0].mean(1))
        return found


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, stride=2), nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def sounds() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 8, 5), nn.ReLU(), nn.ConvTranspose1d(8, 8, 4), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(4, 8, 3), nn.ReLU(), nn.ConvTranspose3d(8, 8, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "convolutions": (convolutions, noise(24, 4, 6, 6)),
    "sounds": (sounds, noise(24, 4, 20)),
    "volumes": (volumes, noise(24, 4, 5, 5, 5)),
    "recurrent": (Recurrent, torch.randint(0, 20, (24, 7), generator=torch.Generator().manual_seed(0))),
    "attention": (Attention, noise(24, 6, 16)),
}
