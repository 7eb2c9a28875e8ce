"""The one training loop: finetune, pruning and distillation all run through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from app.contract.errors import DatasetMismatch, TrainingDiverged
from app.contract.tasks import TASKS
from app.contract.training import Training
from worker.context import Context
from worker.data.batch import Batch
from worker.data.feed import Feed
from worker.techniques.base import Details
from worker.training import optimizers, schedules
from worker.training.distillation import teacher_alone
from worker.training.early_stopping import EarlyStopper
from worker.training.objective import objective

OnStep = Callable[[int, int], bool]
"""Called before each step with its number (from 0) and how many there will be; may change constraints.

Says whether the constraints are final from here on: early stopping judges no epoch before.
"""


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
    objective: Details

    def details(self) -> Details:
        """The same for a step's report."""
        found: Details = {
            "training_steps": self.steps,
            "training_epochs": round(self.epochs, 3),
            "training_first_epoch_loss": self.first_epoch_loss,
            "training_last_epoch_loss": self.last_epoch_loss,
            **self.objective,
        }
        if self.teacher_alone:
            found["training_targets"] = "the teacher's alone"
        if self.best_epoch is not None:
            found["training_stopped_early"] = self.stopped_early
            found["training_best_epoch"] = self.best_epoch
            found["training_best_validation_metric"] = self.best_validation_metric
        return found


def train(context: Context, training: Training, on_step: OnStep | None = None) -> TrainingSummary:
    """Trains `context.model.module` in place on the split `train` and leaves it in eval mode.

    The seed decides the order of the samples and every random number of the training (dropout): on a CPU two runs give
    equal bits. The random state of the process is left as it was. With early stopping the weights of the best epoch
    are put back at the end. Raises TrainingDiverged, naming step and learning rate, where the loss or a weight is not
    finite; DatasetMismatch without training data, or without labels where no teacher stands in for them; Unsupported
    without trainable weights.
    """
    devices = [context.device] if context.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(context.seed)
        return _Run(context, training, on_step).train()


class _Run:
    """One training: what stays the same over its steps, and how far it is."""

    def __init__(self, context: Context, training: Training, on_step: OnStep | None) -> None:
        self.context = context
        self.training = training
        self.on_step = on_step
        self.feed = _fed(context.feed)
        self.module = context.model.module.to(context.device)
        self.per_epoch = _steps_per_epoch(self.feed.size("train"), training.batch_size, _drops_single(self.module))
        self.total = training.steps or (training.epochs or 1) * self.per_epoch
        self.order = torch.Generator().manual_seed(context.seed)
        self.noise = torch.Generator().manual_seed(context.seed)
        self.loss = objective(context, self.feed.task, training.distill, samples=self.total * training.batch_size)
        # What the loss learns itself (projections of hints) is trained along with the model.
        self.optimizer = optimizers.build(nn.ModuleList((self.module, self.loss.modules)), training)
        self.sign = 1 if TASKS[context.model.facts.task].higher_is_better else -1
        self.teacher_alone = False
        self.stopper = EarlyStopper(self.module, training.early_stopping) if training.early_stopping else None
        self.step = 0
        self.settled = True

    def train(self) -> TrainingSummary:
        means: list[float] = []
        stop = False
        try:
            while self.step < self.total and not stop:
                means.append(self._epoch())
                self._check_weights()
                stop = self._should_stop(len(means))
        finally:
            self.module.eval()
        if self.stopper is not None:
            self.stopper.restore()
        self.context.progress(1.0)
        return TrainingSummary(
            steps=self.step,
            epochs=self.step / self.per_epoch,
            first_epoch_loss=means[0],
            last_epoch_loss=means[-1],
            stopped_early=self.step < self.total,
            best_validation_metric=self.sign * self.stopper.best if self.stopper is not None else None,
            best_epoch=self.stopper.best_epoch if self.stopper is not None else None,
            teacher_alone=self.teacher_alone,
            objective=self.loss.details(),
        )

    def _epoch(self) -> float:
        """One pass over the training data, or the rest of the steps; the mean loss."""
        self.module.train()
        start, loss = self.step, 0.0
        for batch in self._batches():
            loss += self._one_step(batch)
            self.step += 1
            self.context.progress(self.step / self.total)
            if self.step == self.total:
                break
        return loss / (self.step - start)

    def _batches(self) -> Iterator[Batch]:
        """The epoch's batches in random order, without a single left-over sample where BatchNorm could not take it.

        Leaving it out rather than merging it keeps every batch within the size that was asked for; the order is drawn
        anew every epoch, so it is another sample each time.
        """
        size = self.training.batch_size
        left_over = self.per_epoch * size < self.feed.size("train")
        for batch in self.feed.batches("train", size, shuffle=self.order):
            if not (left_over and len(batch) == 1):
                yield batch

    def _one_step(self, batch: Batch) -> float:
        if self.on_step is not None:
            self.settled = self.on_step(self.step, self.total)
        lr = schedules.rate(self.training, self.step, self.total, self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        self.teacher_alone = teacher_alone(self.feed.task, batch)
        loss = self.loss(self.feed.task.prepare(batch, self.noise).to(self.context.device))
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(f"The training loss became {value}", lr)
        loss.backward()
        self.optimizer.step()
        return value

    def _check_weights(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self.module.parameters()):
            raise self._diverged("A weight became infinite or not a number", self.optimizer.param_groups[0]["lr"])

    def _diverged(self, what: str, lr: float) -> TrainingDiverged:
        return TrainingDiverged(
            f"{what} at step {self.step} of {self.total}, at a learning rate of {lr:g} "
            f"({self.training.optimizer}). Use a lower learning rate."
        )

    def _should_stop(self, epoch: int) -> bool:
        if self.stopper is None or not self.settled:
            return False
        self.module.eval()
        metric, _ = self.feed.score(self._forward, "validation")
        return self.stopper.judge(self.sign * metric, epoch)

    def _forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        return self.module(*(tensor.to(self.context.device) for tensor in inputs))


def _fed(feed: Feed | None) -> Feed:
    if feed is None or "train" not in feed.data.splits or feed.size("train") == 0:
        raise DatasetMismatch("Training needs a `train` split with at least one sample.", pointer="/dataset")
    return feed


def _drops_single(module: nn.Module) -> bool:
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


def _steps_per_epoch(samples: int, batch_size: int, drops_single: bool) -> int:
    full, rest = divmod(samples, batch_size)
    return full + (rest > 1 or (rest == 1 and not (drops_single and full > 0)))
