"""One class a sample: images, texts and sounds."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.data.batch import Batch
from worker.metrics.kinds import MANY, of_classes
from worker.metrics.tally import Tally
from worker.objectives.base import Forward, Plain, required, run
from worker.training import losses


class Classification(Plain):
    """Logits [batch, classes] against classes int64 [batch], or shares of them where samples are mixed."""

    metrics = of_classes

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return losses.cross_entropy(outputs, required(batch), batch.smoothing)

    def divergence(self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float) -> Tensor:
        return losses.soft_targets(student, teacher, temperature)

    def judge(self, tally: Tally, forward: Forward, batch: Batch) -> None:
        """A sample is right where its largest logit is the target's. A row with a NaN is wrong."""
        targets, logits = required(batch).cpu(), run(forward, batch).double()
        broken = logits.isnan().any(-1)
        said = logits.argmax(-1)
        said = torch.where(broken, (targets + 1) % logits.shape[-1], said)
        likelihoods = logits.log_softmax(-1)
        own = likelihoods.gather(-1, targets[:, None])
        values = {
            "accuracy": ((said == targets) & ~broken,),
            "balanced_accuracy": (said, targets),
            "macro_f1": (said, targets),
            "top_5_accuracy": (likeliest(logits, targets, MANY) & ~broken,),
            "log_loss": (-own,),
            "calibration_error": (likelihoods.exp().nan_to_num(), targets),
        }
        tally.update(len(batch), len(batch), logits.shape[-1], values)


def likeliest(logits: Tensor, targets: Tensor, count: int) -> Tensor:
    """Whether the class of each row is among so many likeliest, no more than `count` of them also where many are equal.

    Shapes: [rows, classes], [rows] -> bool [rows].
    """
    chosen = logits.topk(min(count, logits.shape[-1])).indices
    return (chosen == targets[:, None]).any(-1)
