"""Loss functions on logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def cross_entropy(student: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of logits [batch, classes] against classes int64 [batch]."""
    return functional.cross_entropy(student, targets)


def distillation(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, alpha: float) -> Tensor:
    """Knowledge distillation (Hinton, Vinyals & Dean 2015): alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE.

    Logits are [batch, classes], targets int64 [batch]; both distributions of the divergence are softened by the
    temperature, and T^2 keeps the size of its gradients independent of it. All terms are means over the batch.
    """
    soft_student = functional.log_softmax(student / temperature, dim=-1)
    soft_teacher = functional.log_softmax(teacher / temperature, dim=-1)
    divergence = functional.kl_div(soft_student, soft_teacher, reduction="batchmean", log_target=True)
    return alpha * temperature**2 * divergence + (1 - alpha) * cross_entropy(student, targets)
