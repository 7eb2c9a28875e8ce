"""Batches for one model out of one dataset: raw samples encoded, targets mapped to the model's classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from app.contract.compatibility import label_map
from app.contract.tasks import TASKS
from worker.data.base import Data, RawBatch, RawTargets, Split
from worker.data.batch import IGNORED, Batch, Share
from worker.metrics.tally import Scores
from worker.model import Model
from worker.objectives.base import Forward, scores
from worker.objectives.speech import transcripts
from worker.ranks.ranks import Ranks


class Feed:
    """Feeds one model from one dataset."""

    def __init__(self, model: Model, data: Data) -> None:
        self.data = data
        self.task = model.task
        self._encode = model.encode
        self._kind = TASKS[model.facts.task].targets
        named = data.facts.labels is not None and TASKS[model.facts.task].names_classes
        self._classes = torch.tensor(label_map(model.facts, data.facts)) if named else None

    def size(self, split: str) -> int:
        """Samples in a split."""
        return len(self.data.splits[split])

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        shuffle: torch.Generator | None = None,
        limit: int | None = None,
        skip: int = 0,
        share: Share | None = None,
        turns: Share | None = None,
    ) -> Iterator[Batch]:
        """Every sample of a split once (the last batch may be short), or the first `limit` of the order.

        The first `skip` batches are left out, and not read; nor is what is not the `share` of a batch. Processes that
        take `turns` get each batch in one of them.
        """
        source = self.data.splits[split]
        count = len(source)
        order = torch.arange(count) if shuffle is None else torch.randperm(count, generator=shuffle)
        order = order[:limit]
        for start in range(skip * batch_size, len(order), batch_size):
            if turns is not None and start // batch_size % turns.size != turns.rank:
                continue
            indices = order[start : start + batch_size].tolist()
            if share is None:
                yield self._read(source, indices)
                continue
            rows = share.of(len(indices))
            own = indices[rows.start : rows.stop] or indices[:1]
            yield replace(self._read(source, own), whole=len(indices), stand_in=not rows)

    def score(self, forward: Forward, split: str) -> tuple[float, int]:
        """The task's metric on a split, and on how many samples; draws no random numbers of the process.

        A module behind `forward` must be in eval mode and take inputs that lie on the CPU. Raises DatasetMismatch where
        the split holds no sample or no targets.
        """
        found = self.scores(forward, split)
        return found.value, found.samples

    def scores(self, forward: Forward, split: str, ranks: Ranks | None = None) -> Scores:
        """The same, and the task's other metrics. Several processes take turns, and all get what comes of it."""
        turns = Share(ranks.rank, ranks.size) if ranks is not None else None
        with torch.inference_mode():
            return scores(self.task, forward, self.batches(split, self.task.evaluation_batch, turns=turns), ranks)

    def _read(self, source: Split, indices: list[int]) -> Batch:
        return replace(self._batch(source.read(indices)), indices=tuple(indices))

    def _batch(self, raw: RawBatch) -> Batch:
        raw = replace(raw, targets=self._mapped(raw.targets))
        inputs = self._encode(raw)
        references = transcripts(raw) if self._kind == "transcripts" else None
        return Batch(inputs, self.task.targets(raw, inputs), references)

    def _mapped(self, targets: RawTargets | None) -> RawTargets | None:
        """Class numbers of the dataset as those of the model."""
        if self._classes is None or targets is None:
            return targets
        if isinstance(targets, Tensor):
            return self._class_of(targets)
        return [self._class_of(own) for own in targets if isinstance(own, Tensor)]

    def _class_of(self, targets: Tensor) -> Tensor:
        assert self._classes is not None
        return torch.where(targets == IGNORED, IGNORED, self._classes[targets.clamp(min=0)])
