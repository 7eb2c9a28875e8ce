"""A residual network of the size of those for small pictures (He 2015)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BATCH = 128  # of `trained`


class Block(nn.Module):
    """Two convolutions and a way around them (He 2015)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = stride == 1 and before == after
        self.around = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[batch, before, height, width] -> [batch, after, height / stride, width / stride]."""
        return nn.functional.relu(self.body(inputs) + self.around(inputs))


def resnet() -> nn.Module:
    """ResNet-20's widths and depths on one channel: 0.27 million parameters."""
    blocks = [Block(16, 16, 1) for _ in range(3)]
    for before, after in ((16, 32), (32, 64)):
        blocks += [Block(before, after, 2), Block(after, after, 1), Block(after, after, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks, *head)


def trained(module: nn.Module, inputs: Tensor, targets: Tensor, epochs: int) -> nn.Module:
    """The module in eval mode after so many epochs of AdamW, in batches of 128, over one cycle of rates."""
    steps = len(inputs) // BATCH
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs))[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs[rows]), targets[rows]).backward()
            optimizer.step()
            schedule.step()
    return module.eval()
