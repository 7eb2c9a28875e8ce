"""A student that learns from its teacher's answers beside, or instead of, the targets."""

from __future__ import annotations

from torch import Tensor

from app.contract.training import Distill
from worker.data.batch import Batch
from worker.objectives.base import Task


def distilled(task: Task, student: Tensor, teacher: Tensor, batch: Batch, distill: Distill) -> Tensor:
    """alpha * divergence + (1 - alpha) * the task's loss (Hinton, Vinyals & Dean 2015).

    Where there are no targets, or the task has no loss of its own, the teacher is all there is to learn from.
    """
    soft = task.divergence(student, teacher, batch, distill.temperature)
    if teacher_alone(task, batch) or distill.alpha == 1:
        return soft
    return distill.alpha * soft + (1 - distill.alpha) * task.loss(student, batch)


def teacher_alone(task: Task, batch: Batch) -> bool:
    """Whether nothing but a teacher can say what is right."""
    return batch.targets is None or not task.supervised
