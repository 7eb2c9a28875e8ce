"""Distillation as a step of its own: the student takes the model's place, and learns from its teacher."""

from __future__ import annotations

from typing import ClassVar

import torch

from app.contract.spec import DistillStep
from worker.context import Context
from worker.evaluation.macs import module_macs
from worker.model import Model
from worker.students.students import Made, student_of
from worker.techniques.base import Details
from worker.training.finding.settle import settle
from worker.training.loop import train


class DistillTechnique:
    """Trains a student; without one, the model as it stands."""

    name: ClassVar[str] = "distill"

    def applies(self, step: DistillStep, model: Model) -> str | None:
        """A model that is trained itself needs weights that torch computes with; a teacher has not to be trained."""
        if step.student is not None or model.facts.trainable:
            return None
        return model.facts.untrainable_reason

    def apply(self, step: DistillStep, context: Context) -> Details:
        """Puts the student in the model's place and trains it."""
        details: Details = {}
        if step.student is not None:
            teacher = context.model
            made = student_of(context, step.student, torch.get_num_threads())
            details = made.details | _sizes(teacher, made)
            context.replace_model(made.model)
            context.edits = None
        training, found = settle(context, step.training)
        return details | found | train(context, training).details()


def _sizes(teacher: Model, made: Made) -> Details:
    """Parameters and MACs of a sample, of both."""
    found: Details = {}
    for name, model in (("teacher", teacher), ("student", made.model)):
        module = model.module
        device = next(module.parameters()).device
        example = tuple(tensor.to(device) for tensor in model.example(1))
        found[f"{name}_parameters"] = sum(parameter.numel() for parameter in module.parameters())
        found[f"{name}_macs"] = module_macs(module, example)
    return found
