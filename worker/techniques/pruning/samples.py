"""Samples that a network is looked at with; labels are not needed of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from app.contract.errors import DatasetMismatch
from app.contract.facts import calibration_split
from worker.context import Context
from worker.data.batch import Batch


def has_samples(context: Context) -> bool:
    """Whether there are any."""
    return context.feed is not None and calibration_split(context.feed.data.facts) is not None


def calibration(context: Context, size: int, samples: int, why: str) -> Iterator[Batch]:
    """Batches of at most `size`, `samples` in all and the same each time, on the model's device.

    Raises DatasetMismatch, saying `why` they are needed, where there are none.
    """
    split = calibration_split(context.feed.data.facts) if context.feed is not None else None
    if context.feed is None or split is None:
        raise DatasetMismatch(f"{why}: give a dataset.", pointer="/dataset")
    order = torch.Generator().manual_seed(context.seed)
    for batch in context.feed.batches(split, size, shuffle=order, limit=samples):
        yield batch.to(context.device)
