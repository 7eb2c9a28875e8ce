"""What a step of training lowers: the loss of one batch, with the teacher's answer in it where there is one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from app.contract.errors import InvalidSpec
from app.contract.training import Distill
from worker.context import Context
from worker.data.batch import Batch
from worker.objectives.base import Task
from worker.training.distillation import distilled

Objective = Callable[[Batch], Tensor]
"""Takes a batch on the model's device and gives the scalar to lower."""


def objective(context: Context, task: Task, distill: Distill | None) -> Objective:
    """The objective of `context.model`, which is in training mode when it is asked."""
    student = context.model.module
    if distill is None:
        return lambda batch: task.loss(_outputs(student, batch), batch)
    teacher = context.teacher.to(context.device).eval()

    def loss(batch: Batch) -> Tensor:
        # Not inference_mode: autograd keeps the teacher's answer for the student's gradient.
        with torch.no_grad():
            answer = teacher(*batch.inputs)
        return distilled(task, _outputs(student, batch), answer, batch, distill)

    return loss


def _outputs(student: nn.Module, batch: Batch) -> Tensor:
    try:
        return student(*batch.inputs)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InvalidSpec(
            "BatchNorm cannot be trained on one sample at a time: use a batch_size of 2 or more, "
            "and a `train` split of as many samples."
        ) from error
