"""The one training loop: finetune, pruning and distillation all run through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from app.contract.errors import DatasetMismatch, Unsupported
from app.contract.tasks import TASKS
from app.contract.training import Settled, Training
from worker.context import Context
from worker.data.batch import Batch, Share
from worker.data.feed import Feed
from worker.objectives.base import prepares
from worker.ranks.ranks import Ranks
from worker.ranks.sharded import Shards
from worker.ranks.state import check_same, same_module, threads_shared
from worker.training import averaging, schedules
from worker.training.augmenting.augmenter import Augmenter
from worker.training.distillation import teacher_alone
from worker.training.divergence import Diverged, Guard
from worker.training.early_stopping import EarlyStopper
from worker.training.layout import channels_last
from worker.training.objective import Objective, Penalized, objective
from worker.training.place import Place
from worker.training.plateau import Plateau
from worker.training.randomness import seeded
from worker.training.recovery import HasState, Recovery, check_weights
from worker.training.sharing import lesson_of
from worker.training.stepping import Stepper
from worker.training.summary import TrainingSummary

OnStep = Callable[[int, int], bool]
"""Called before each step with its number (from 0) and how many there will be; may change constraints.

Says whether the constraints are final from here on: early stopping judges no epoch before. A training that goes back,
or on in a new attempt, calls it again for the steps that it repeats.
"""


def train(
    context: Context,
    training: Training,
    on_step: OnStep | None = None,
    *,
    rate: Callable[[int], float] | None = None,
    on_loss: Callable[[float], None] | None = None,
    penalty: nn.Module | None = None,
) -> TrainingSummary:
    """Trains `context.model.module` in place on the split `train` and leaves it in eval mode.

    The seed decides the order of the samples and every random number of the training (dropout): on a CPU two runs give
    equal bits. The random state of the process is left as it was. With early stopping the weights of the best epoch
    are put back at the end, with averaging the mean is. Where the context's job has a checkpoint of this training, it
    goes on from there, and ends with the bits of a training that was never interrupted. A training that diverges goes
    back to its last checkpoint and on with a lower rate, `divergence_retries` times.

    In a job of several processes all of them call this, and hold equal modules afterwards. They train together, each on
    its share of every batch, or, where the training is for one process, the first trains and the others wait.

    `rate` stands in place of the schedule: the learning rate by step. `on_loss` is told the loss of every step, and may
    raise to end it all. What `penalty` gives without inputs is added to the loss, and what it has to learn is learned.

    Raises TrainingDiverged, naming step and learning rate, where that does not help; DatasetMismatch without training
    data, or without labels where no teacher stands in for them; InvalidSpec for a warm-up longer than the training;
    Unsupported without trainable weights, or for a precision that the device lacks; Unusable for a checkpoint of
    something else.
    """
    ranks = context.ranks
    settled = training.settled()

    def run(within: Ranks) -> TrainingSummary:
        with seeded((context.seed + SEEDS_APART * within.rank) % SEEDS, context.device):
            own = replace(context, ranks=within)
            if not settled.sharded:
                with _laid_out(own, settled):
                    return _Run(own, settled, on_step, rate, on_loss, penalty=penalty).train()
            if on_step is not None:
                raise Unsupported(
                    "A sparsity that grows during the training looks at whole weights, and sharded has shares of them. "
                    "Prune at once (schedule one_shot), or leave sharded out."
                )
            shards = Shards(own.model.module, within)
            own.model = replace(own.model, module=shards.module)
            summary = _Run(own, settled, on_step, rate, on_loss, shards).train()
            shards.fill()
            own.model.module.eval()
            return summary

    same_module(context.model.module, ranks)
    with threads_shared(ranks if settled.ranks > 1 else Ranks()):
        summary = run(ranks) if settled.ranks > 1 else ranks.told(lambda: run(Ranks()))
    same_module(context.model.module, ranks)
    return summary


@contextmanager
def _laid_out(context: Context, training: Settled) -> Iterator[None]:
    """The networks as a CPU computes them fastest, where one process trains on samples of one size."""
    fixed = all(None not in tensor.shape for tensor in context.model.facts.inputs)
    if context.device.type != "cpu" or context.ranks.size > 1 or not fixed:
        yield
        return
    example = context.model.example(batch=EXAMPLE_BATCH)
    taught = channels_last(context.teacher, example) if training.distill is not None else nullcontext()
    with channels_last(context.model.module, example), taught:
        yield


EXAMPLE_BATCH = 2
SEEDS = 1 << 32  # there are so many
SEEDS_APART = 0x9E3779B1  # between the processes of a training: far, and no two alike


class _Run:
    """One training: what stays the same over its steps, and how far it is."""

    def __init__(
        self,
        context: Context,
        training: Settled,
        on_step: OnStep | None,
        rate: Callable[[int], float] | None = None,
        on_loss: Callable[[float], None] | None = None,
        shards: Shards | None = None,
        penalty: nn.Module | None = None,
    ) -> None:
        self.scheduled, self.on_loss = rate or self._scheduled, on_loss
        self.context, self.training, self.on_step = context, training, on_step
        self.feed = fed(context.feed)
        self.module = context.model.module.to(context.device)
        self.per_epoch = _steps_per_epoch(self.feed.size("train"), training.batch_size, _drops_single(self.module))
        self.total = training.steps or (training.epochs or 1) * self.per_epoch
        schedules.warmup(training, self.total)
        seen = self.total * training.batch_size
        self.augment = Augmenter(training, context.model.facts, context.device)
        fixed = self.augment.fixed
        self.loss: Objective = objective(context, self.feed.task, training.distill, samples=seen, fixed=fixed)
        if penalty is not None:
            self.loss = Penalized(self.loss, penalty.to(context.device))
        self.ranks, self.shards = context.ranks, shards
        lesson = lesson_of(self.module, self.loss, self.ranks, shards)
        self.stepper = Stepper(self.module, self.feed.task, lesson, training, context.device, self.ranks)
        self.order = torch.Generator().manual_seed(context.seed)
        self.noise = torch.Generator().manual_seed(context.seed)
        self.averaged = averaging.averaged(self.module, training, self.total, self.per_epoch)
        self.stopper = EarlyStopper(self.module, training.early_stopping) if training.early_stopping else None
        self.plateau = Plateau(training)
        self.guard = Guard(training.divergence_retries)
        self.at = Place()
        self.lr = training.lr
        self._share = Share(self.ranks.rank, self.ranks.size) if self.ranks.size > 1 else None
        # Numbers that are drawn for a batch are drawn for all of it, to be the same in one process and in several.
        self._read = None if prepares(self.feed.task) or not self.augment.fixed else self._share
        parts: dict[str, HasState | None] = {"optimizer": self.stepper, "plateau": self.plateau}
        parts |= {"stopper": self.stopper, "averaged": self.averaged}
        parts["objective"] = self.loss if self.loss.learns else None
        parts["constraints"] = on_step if isinstance(on_step, HasState) else None
        self.recovery = Recovery(context, training, self.guard, self.at, self.noise, parts)
        self.sign = 1 if TASKS[context.model.facts.task].higher_is_better else -1

    def train(self) -> TrainingSummary:
        try:
            self.recovery.resume()
            stop = False
            while self.at.step < self.total and not stop:
                try:
                    stop = self._epoch()
                except Diverged as trouble:
                    self.recovery.go_back(trouble, self.lr, self.total)
            self._finish()
        finally:
            self.module.eval()
            self.recovery.close()
        self.context.progress(1.0)
        return self._summary()

    def _epoch(self) -> bool:
        """One pass over the training data, or the rest of it, or of the steps; whether it was the last by choice."""
        self.module.train()
        if self.at.order is None:
            self.at.order = self.order.get_state()
        self.order.set_state(self.at.order)
        batches = self._batches(self.order, self.at.batch, self._read)
        while self.at.step < self.total:
            self.recovery.mark()
            if (batch := next(batches, None)) is None:
                break
            self._one_step(batch)
        check_weights(self.module, self.ranks)
        if self.shards is None:
            check_same(self.module, self.ranks)
        self.at.means.append(self.at.loss / self.at.batch)
        self.at.batch, self.at.loss, self.at.order = 0, 0.0, None
        return self._judged()

    def _batches(self, shuffle: torch.Generator | None, skip: int = 0, share: Share | None = None) -> Iterator[Batch]:
        """An epoch's batches, or a share of each, without a single left-over sample where BatchNorm could not take it.

        Leaving it out rather than merging it keeps every batch within the size that was asked for; the order is drawn
        anew every epoch, so it is another sample each time.
        """
        size = self.training.batch_size
        left_over = self.per_epoch * size < self.feed.size("train")
        for batch in self.feed.batches("train", size, shuffle=shuffle, skip=skip, share=share):
            if not (left_over and (batch.whole or len(batch)) == 1):
                yield batch

    def _one_step(self, batch: Batch) -> None:
        at = self.at
        if self.on_step is not None:
            at.final = self.on_step(at.step, self.total)
        at.taught = teacher_alone(self.feed.task, batch)
        self.lr = self._rate()
        prepared = self.augment(self.feed.task.prepare(batch, self.noise), self.noise)
        if self._share is not None and self._read is None:
            prepared = prepared.share(self._share)
        loss = self.stepper.step(prepared, self.lr)
        if self.on_loss is not None:
            self.on_loss(loss)
        self.guard.watch(loss, at.final)
        at.step, at.batch, at.loss = at.step + 1, at.batch + 1, at.loss + loss
        if self.averaged is not None:
            self.averaged.step(at.step)
        self.context.progress(at.step / self.total)

    def _scheduled(self, step: int) -> float:
        return schedules.rate(self.training, step, self.total, self.per_epoch)

    def _rate(self) -> float:
        return self.scheduled(self.at.step) * self.plateau.factor * self.guard.factor

    def _judged(self) -> bool:
        """Judges the epoch on the validation split, where anything hangs on that; whether it was the last."""
        if not (self.training.judges and self.at.final):
            return False
        self.module.eval()
        with self.averaged.shown() if self.averaged is not None else nullcontext(), self._whole() as module:
            metric = self.sign * self.feed.scores(self._forward(module), "validation", self.ranks).value
            stop = self.stopper is not None and self.stopper.judge(metric, len(self.at.means))
        if self.training.schedule == "plateau":
            self.plateau.judge(metric)
        return stop

    def _whole(self) -> AbstractContextManager[nn.Module]:
        """The module as any process can ask it alone."""
        return nullcontext(self.module) if self.shards is None else self.shards.filled()

    def _forward(self, module: nn.Module) -> Callable[[tuple[Tensor, ...]], Tensor]:
        return lambda inputs: cast(Tensor, module(*(tensor.to(self.context.device) for tensor in inputs)))

    def _finish(self) -> None:
        """Leaves the weights that are delivered in the module."""
        if self.stopper is not None and self.stopper.best_epoch is not None:
            self.stopper.restore()
        elif self.averaged is not None and (self.ranks.first or self.shards is not None):
            self.averaged.finish(batch.to(self.context.device).inputs for batch in self._batches(None))

    def _summary(self) -> TrainingSummary:
        stopper = self.stopper
        return TrainingSummary(
            steps=self.at.step,
            epochs=self.at.step / self.per_epoch,
            first_epoch_loss=self.at.means[0],
            last_epoch_loss=self.at.means[-1],
            stopped_early=self.at.step < self.total,
            best_validation_metric=self.sign * stopper.best if stopper is not None else None,
            best_epoch=stopper.best_epoch if stopper is not None else None,
            teacher_alone=self.at.taught,
            precision=self.stepper.precision,
            diverged=tuple(self.guard.incidents),
            resumed_at=self.recovery.resumed_at,
            processes=self.ranks.size,
            hosts=self.ranks.size // self.ranks.beside,
            sharded=self.shards is not None,
            objective=self.augment.details() | self.loss.details(),
        )


def fed(feed: Feed | None) -> Feed:
    """The feed of a training; raises DatasetMismatch where there is nothing to train on."""
    if feed is None or "train" not in feed.data.splits or feed.size("train") == 0:
        raise DatasetMismatch("Training needs a `train` split with at least one sample.", pointer="/dataset")
    return feed


def _drops_single(module: nn.Module) -> bool:
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


def _steps_per_epoch(samples: int, batch_size: int, drops_single: bool) -> int:
    full, rest = divmod(samples, batch_size)
    return full + (rest > 1 or (rest == 1 and not (drops_single and full > 0)))
