"""Batches for one model out of one dataset: raw samples encoded, targets mapped to the model's classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from app.contract.compatibility import label_map
from worker.data.base import Data
from worker.model import Inputs, Model


@dataclass(frozen=True)
class Batch:
    """Inputs of the model, and targets as int64 [batch] in the model's classes, or None."""

    inputs: Inputs
    targets: Tensor | None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def to(self, device: torch.device) -> Batch:
        return Batch(
            tuple(tensor.to(device) for tensor in self.inputs),
            None if self.targets is None else self.targets.to(device),
        )


class Feed:
    """Feeds one model from one dataset."""

    def __init__(self, model: Model, data: Data) -> None:
        self.data = data
        self._encode = model.encode
        labels = data.facts.labels
        self._classes = None if labels is None else torch.tensor(label_map(model.facts, data.facts))

    def size(self, split: str) -> int:
        """Samples in a split."""
        return len(self.data.splits[split])

    def batches(
        self, split: str, batch_size: int, *, shuffle: torch.Generator | None = None, limit: int | None = None
    ) -> Iterator[Batch]:
        """Every sample of a split once (the last batch may be short), or the first `limit` of the order."""
        source = self.data.splits[split]
        count = len(source)
        order = torch.arange(count) if shuffle is None else torch.randperm(count, generator=shuffle)
        order = order[:limit]
        for start in range(0, len(order), batch_size):
            raw = source.read(order[start : start + batch_size].tolist())
            targets = raw.targets
            if targets is not None and self._classes is not None:
                targets = self._classes[targets]
            yield Batch(self._encode(raw), targets)
