"""What the training loop and the evaluation ask of a task; neither looks inside a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from app.contract.errors import DatasetMismatch
from worker.data.base import RawBatch
from worker.data.batch import IGNORED, Batch, Inputs
from worker.metrics.tally import Make, Scores, Tally
from worker.ranks.ranks import Ranks

Forward: TypeAlias = Callable[[Inputs], Any]
"""Takes inputs and returns the output as a tensor or an array: a module in eval mode, or another runtime's session."""


class Task(Protocol):
    """One task for one model. Tensors of a batch and its outputs lie on one device."""

    evaluation_batch: int
    """Samples that are evaluated at once: outputs of sequence models are large."""
    supervised: bool
    """Whether the task has a loss of its own; without one a model learns from a teacher alone."""

    def targets(self, raw: RawBatch, inputs: Inputs) -> Tensor | None:
        """The targets of `Batch`, or None where the samples have none. Classes are the model's already."""

    def prepare(self, batch: Batch, random: torch.Generator) -> Batch:
        """What becomes of a batch before the model sees it: masked language models hide tokens here."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The scalar that training lowers; only asked of batches with targets."""

    def terms(self, batch: Batch) -> int:
        """How many terms the loss of a batch is a mean over: samples, or targets that count."""

    def divergence(self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float) -> Tensor:
        """How far a student's outputs are from its teacher's; scalar, 0 where they are equal."""

    def tally(self) -> Tally:
        """Its metrics, of no batch yet."""

    def judge(self, tally: Tally, forward: Forward, batch: Batch) -> None:
        """Takes in what a model makes of a batch. Raises DatasetMismatch for a batch without targets."""


class Plain:
    """What most tasks have in common: batches stay as they are, and targets come as arrays."""

    evaluation_batch = 256
    supervised = True
    metrics: ClassVar[Make]

    def tally(self) -> Tally:
        return Tally(type(self).metrics)

    def targets(self, raw: RawBatch, inputs: Inputs) -> Tensor | None:
        return raw.targets if isinstance(raw.targets, Tensor) else None

    def prepare(self, batch: Batch, random: torch.Generator) -> Batch:
        return batch

    def terms(self, batch: Batch) -> int:
        return len(batch)


def prepares(task: Task) -> bool:
    """Whether a batch is changed before the model sees it, at random: no sample is then the same twice."""
    return getattr(type(task), "prepare", None) is not Plain.prepare


def counting(targets: Tensor | None) -> int:
    """How many targets count."""
    return 0 if targets is None else int((targets != IGNORED).sum())


def required(batch: Batch) -> Tensor:
    """The targets of a batch. Raises DatasetMismatch where it has none."""
    if batch.targets is None:
        raise DatasetMismatch("The split has no targets, which this task is judged by.", pointer="/dataset")
    return batch.targets


def run(forward: Forward, batch: Batch) -> Tensor:
    """The outputs of a batch on the CPU, from whatever runtime."""
    return torch.as_tensor(forward(batch.inputs)).cpu()


def scores(task: Task, forward: Forward, batches: Iterable[Batch], ranks: Ranks | None = None) -> Scores:
    """The metrics of a task over batches, those of all processes; each gives its own, and any number of them.

    Raises DatasetMismatch where they hold no targets.
    """
    tally = task.tally()
    for batch in batches:
        task.judge(tally, forward, batch)
    return tally.scores(ranks)
