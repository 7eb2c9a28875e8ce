"""A residual network of the size of those for small pictures (He 2015)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from worker.loading.layers import Residual

BATCH = 128  # of `trained`


def block(before: int, after: int, stride: int) -> list[nn.Module]:
    """Two convolutions, a way around them, and what follows: [batch, before, height, width] to [batch, after,
    height / stride, width / stride]."""
    layers = nn.Sequential(
        nn.Conv2d(before, after, 3, stride, 1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, 1, 1, bias=False),
        nn.BatchNorm2d(after),
    )
    around = [] if stride == 1 and before == after else [nn.Conv2d(before, after, 1, stride, bias=False)]
    return [Residual(layers, nn.Sequential(*around)), nn.ReLU()]


def resnet() -> nn.Sequential:
    """ResNet-20's widths and depths on one channel: 0.27 million parameters."""
    sizes = [
        (16, 16, 1),
        (16, 16, 1),
        (16, 16, 1),
        (16, 32, 2),
        (32, 32, 1),
        (32, 32, 1),
        (32, 64, 2),
        (64, 64, 1),
        (64, 64, 1),
    ]
    blocks = [layer for own in sizes for layer in block(*own)]
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
