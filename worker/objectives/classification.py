"""One class a sample: images, texts and sounds."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from worker.data.batch import Batch
from worker.objectives.base import Forward, Plain, counted, required, run
from worker.training import losses


class Classification(Plain):
    """Logits [batch, classes] against classes int64 [batch], or shares of them where samples are mixed."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return losses.cross_entropy(outputs, required(batch), batch.smoothing)

    def divergence(self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float) -> Tensor:
        return losses.soft_targets(student, teacher, temperature)

    def score(self, forward: Forward, batches: Iterable[Batch]) -> tuple[float, int]:
        """Accuracy: the share of samples whose largest logit is the target's. A row with a NaN counts as wrong."""
        correct = total = 0
        for batch in batches:
            targets = required(batch)
            logits = run(forward, batch)
            hits = (logits.argmax(-1) == targets.cpu()) & ~logits.isnan().any(-1)
            correct += int(hits.sum())
            total += len(batch)
        return correct / counted(total), total
