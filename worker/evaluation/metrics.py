"""Task metrics over anything that turns inputs into logits: a torch module or a session of another runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from app.contract.errors import DatasetMismatch
from worker.data.feed import Feed
from worker.model import Inputs


def accuracy(forward: Callable[[Inputs], Any], feed: Feed, split: str, batch_size: int = 256) -> tuple[float, int]:
    """The share of samples whose largest logit is the target's, and how many samples that is.

    `forward` takes a batch of inputs and returns logits [batch, classes] as a tensor or an array; a module must be in
    eval mode and on the feed's device already. A row with a NaN counts as wrong. No random numbers are drawn. Raises
    DatasetMismatch where the split holds no sample or no targets.
    """
    correct = total = 0
    with torch.inference_mode():
        for batch in feed.batches(split, batch_size):
            if batch.targets is None:
                raise DatasetMismatch(f"Accuracy needs targets; the split `{split}` has none.", pointer="/dataset")
            logits = torch.as_tensor(forward(batch.inputs)).cpu()
            hits = (logits.argmax(-1) == batch.targets.cpu()) & ~logits.isnan().any(-1)
            correct += int(hits.sum())
            total += len(batch)
    if total == 0:
        raise DatasetMismatch(f"Accuracy needs samples; the split `{split}` is empty.", pointer="/dataset")
    return correct / total, total
