"""Numbers instead of classes: regression, and several labels at once."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from app.contract.errors import DatasetMismatch
from worker.data.batch import Batch
from worker.metrics.kinds import of_labels, of_values
from worker.metrics.tally import Tally
from worker.objectives.base import Forward, Plain, required, run


class Regression(Plain):
    """Values [batch, ...] of any shape; stands in for outputs that no other task has, such as detection maps."""

    metrics = of_values

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return functional.mse_loss(outputs, _like(required(batch), outputs))

    def divergence(self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float) -> Tensor:
        return functional.mse_loss(student, teacher)

    def judge(self, tally: Tally, forward: Forward, batch: Batch) -> None:
        """Every value counts, however many a sample has."""
        outputs = run(forward, batch).double()
        targets = _like(required(batch).cpu(), outputs)
        error = outputs - targets
        values = {
            "mean_squared_error": (error.square(),),
            "root_mean_squared_error": (error.square(),),
            "mean_absolute_error": (error.abs(),),
            "r2": (outputs.flatten(), targets.flatten()),
        }
        tally.update(len(batch), len(batch), 0, values)


class MultiLabel(Plain):
    """Logits [batch, labels], each label on its own; targets are 0 or 1, or between where samples are mixed."""

    metrics = of_labels

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

    def judge(self, tally: Tally, forward: Forward, batch: Batch) -> None:
        """A label is said at a probability of more than one half."""
        outputs = run(forward, batch).flatten(1)
        targets = (_like(required(batch).cpu(), outputs) > 0.5).long()
        said, likelihoods = (outputs > 0).long(), outputs.sigmoid().nan_to_num()
        values = {
            "f1": (said, targets),
            "macro_f1": (said, targets),
            "mean_average_precision": (likelihoods, targets),
            "exact_match": (said, targets),
        }
        tally.update(len(batch), len(batch), outputs.shape[1], values)


def _like(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets in the shape and dtype of the outputs; raises DatasetMismatch where their numbers differ."""
    if targets.numel() != outputs.numel():
        raise DatasetMismatch(
            f"A batch of targets has the shape {list(targets.shape)}; the model gives {list(outputs.shape)}.",
            pointer="/dataset",
        )
    return targets.reshape(outputs.shape).to(outputs.dtype)
