"""Loss functions on logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from worker.data.batch import IGNORED


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy of logits [..., classes] against classes int64 [...] over the targets that count.

    Targets may be shares float [..., classes] too, which all count. `smoothing` of each target is spread evenly over
    all classes (Szegedy et al. 2015).
    """
    flat = logits.flatten(0, -2)
    if targets.is_floating_point():
        return functional.cross_entropy(flat, targets.flatten(0, -2), label_smoothing=smoothing)
    return functional.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, label_smoothing=smoothing)


def soft_targets(student: Tensor, teacher: Tensor, temperature: float, counts: Tensor | None = None) -> Tensor:
    """T^2 * KL(teacher || student) of logits [..., classes], both softened by the temperature T.

    T^2 keeps the size of the gradients independent of T (Hinton, Vinyals & Dean 2015). The mean is taken over all
    leading positions, or over those where `counts` (bool, of their shape) is true.
    """
    if counts is not None:
        student, teacher = student[counts], teacher[counts]
    soft_teacher = functional.log_softmax(teacher / temperature, dim=-1)
    divergence = functional.kl_div(
        functional.log_softmax(student / temperature, dim=-1), soft_teacher, reduction="sum", log_target=True
    )
    return divergence * (temperature**2 / max(1, soft_teacher[..., 0].numel()))
