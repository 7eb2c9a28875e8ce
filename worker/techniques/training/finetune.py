"""Fine-tuning: the training loop and nothing else. Distillation is an option of the training."""

from __future__ import annotations

from typing import ClassVar

from app.contract.spec import Finetune
from worker.context import Context
from worker.model import Model
from worker.techniques.base import Details
from worker.training.finding.settle import settle
from worker.training.loop import train


class FinetuneTechnique:
    """Trains the model as it stands; constraints of earlier steps hold because they sit on the weights."""

    name: ClassVar[str] = "finetune"

    def applies(self, step: Finetune, model: Model) -> str | None:
        """A model needs weights that torch computes with."""
        if not model.facts.trainable:
            return model.facts.untrainable_reason
        trainable = any(parameter.requires_grad for parameter in model.module.parameters())
        return None if trainable else "The model has no trainable weights."

    def apply(self, step: Finetune, context: Context) -> Details:
        """Trains."""
        training, found = settle(context, step.training)
        return found | train(context, training).details()
