"""What a training did, for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from worker.techniques.base import Details


@dataclass(frozen=True)
class TrainingSummary:
    """What a training did; losses are means over the steps of an epoch."""

    steps: int
    epochs: float
    first_epoch_loss: float
    last_epoch_loss: float
    stopped_early: bool
    best_validation_metric: float | None
    best_epoch: int | None
    teacher_alone: bool
    precision: str
    diverged: tuple[dict[str, Any], ...] = ()
    resumed_at: int | None = None
    processes: int = 1
    hosts: int = 1
    sharded: bool = False
    objective: Details = field(default_factory=dict)

    def details(self) -> Details:
        """The same for a step's report."""
        found: Details = {
            "training_steps": self.steps,
            "training_epochs": round(self.epochs, 3),
            "training_first_epoch_loss": self.first_epoch_loss,
            "training_last_epoch_loss": self.last_epoch_loss,
            **self.objective,
        }
        if self.processes > 1:
            found["training_processes"], found["training_sharded"] = self.processes, self.sharded
        if self.hosts > 1:
            found["training_hosts"] = self.hosts
        if self.precision != "float32":
            found["training_precision"] = self.precision
        if self.teacher_alone:
            found["training_targets"] = "the teacher's alone"
        if self.best_epoch is not None:
            found["training_stopped_early"] = self.stopped_early
            found["training_best_epoch"] = self.best_epoch
            found["training_best_validation_metric"] = self.best_validation_metric
        if self.diverged:
            found["training_diverged"] = list(self.diverged)
        if self.resumed_at is not None:
            found["training_resumed_at_step"] = self.resumed_at
        return found
