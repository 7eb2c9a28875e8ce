"""A student that learns from its teacher's answers beside, or instead of, the targets."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.data.batch import Batch
from worker.objectives.base import Task


def combined(task: Task, student: Tensor, said: Tensor, batch: Batch, alpha: float) -> Tensor:
    """alpha * what the teacher says + (1 - alpha) * the task's loss (Hinton, Vinyals & Dean 2015).

    Where there are no targets, or the task has no loss of its own, the teacher is all there is to learn from.
    """
    if teacher_alone(task, batch) or alpha == 1:
        return said
    return torch.lerp(task.loss(student, batch), said, alpha)


def teacher_alone(task: Task, batch: Batch) -> bool:
    """Whether nothing but a teacher can say what is right."""
    return batch.targets is None or not task.supervised
