"""Numbers instead of classes: regression, and several labels at once."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn import functional

from app.contract.errors import DatasetMismatch
from worker.data.batch import Batch
from worker.objectives.base import Forward, Plain, counted, required, run


class Regression(Plain):
    """Values [batch, ...] of any shape; stands in for outputs that no other task has, such as detection maps."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return functional.mse_loss(outputs, _like(required(batch), outputs))

    def divergence(self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float) -> Tensor:
        return functional.mse_loss(student, teacher)

    def score(self, forward: Forward, batches: Iterable[Batch]) -> tuple[float, int]:
        """The mean squared error over all values."""
        total = squares = values = 0.0
        for batch in batches:
            outputs = run(forward, batch).double()
            error = outputs - _like(required(batch).cpu(), outputs)
            squares += float(error.square().sum())
            values += error.numel()
            total += len(batch)
        return squares / max(values, 1), counted(int(total))


class MultiLabel(Plain):
    """Logits [batch, labels], each label on its own; targets are 0 or 1, or between where samples are mixed."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        targets = _like(required(batch), outputs)
        smoothed = (1 - batch.smoothing) * targets + batch.smoothing / 2  # yes and no are the classes of a label
        return functional.binary_cross_entropy_with_logits(outputs, smoothed)

    def divergence(self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float) -> Tensor:
        """Cross-entropy of each label's softened probability, less the teacher's own entropy; times T^2."""
        soft = (teacher / temperature).sigmoid()
        cross = functional.binary_cross_entropy_with_logits(student / temperature, soft)
        own = functional.binary_cross_entropy_with_logits(teacher / temperature, soft)
        return temperature**2 * (cross - own)

    def score(self, forward: Forward, batches: Iterable[Batch]) -> tuple[float, int]:
        """Micro-averaged F1 at a probability of one half."""
        right = said = true = total = 0
        for batch in batches:
            outputs = run(forward, batch)
            targets = _like(required(batch).cpu(), outputs) > 0.5
            labelled = outputs > 0
            right += int((labelled & targets).sum())
            said += int(labelled.sum())
            true += int(targets.sum())
            total += len(batch)
        counted(total)
        return (2 * right / (said + true) if said + true else 1.0), total


def _like(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets in the shape and dtype of the outputs; raises DatasetMismatch where their numbers differ."""
    if targets.numel() != outputs.numel():
        raise DatasetMismatch(
            f"A batch of targets has the shape {list(targets.shape)}; the model gives {list(outputs.shape)}.",
            pointer="/dataset",
        )
    return targets.reshape(outputs.shape).to(outputs.dtype)
