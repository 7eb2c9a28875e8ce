"""What the processes of the tests do: importable, since they are other processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.contract.training import Training
from tests.worker.helpers import context_for, convnet, digits_data, mlp, part_of, tiny_model
from worker.ranks.ranks import Ranks
from worker.training.loop import train

NETS = {
    "mlp": (lambda: mlp(), (64,)),
    "mlp with BatchNorm": (lambda: mlp(norm=True), (64,)),
    "convnet": (lambda: convnet(), (1, 8, 8)),
}


def training(
    ranks: Ranks, net: str, scratch: Path, fields: dict[str, Any]
) -> tuple[list[float], dict[str, Tensor], Any]:
    """The loss of every step, the state that comes out, and the summary."""
    make, shape = NETS[net]
    data = part_of(digits_data(shape), {"train": 333, "validation": 101})
    own = scratch / f"scratch-{ranks.size}"
    own.mkdir(parents=True, exist_ok=True)
    context = context_for(tiny_model(make(), shape=shape), data, own)
    context.ranks = ranks
    losses: list[float] = []
    summary = train(context, Training(processes=ranks.size, **fields), on_loss=losses.append)
    return losses, context.model.module.state_dict(), summary
