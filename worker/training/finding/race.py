"""A race of settings: short trainings of copies, of which the better third goes on to a longer one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import optuna

from app.contract.errors import TrainingDiverged
from app.contract.optimizing import Optimizer
from app.contract.tasks import TASKS
from app.contract.training import Settled, Training
from worker.context import Context
from worker.data.feed import Feed
from worker.objectives.base import Forward
from worker.training.finding.halving import Round, survivors
from worker.training.finding.range_test import highest
from worker.training.finding.rehearsal import brief, rehearsal
from worker.training.loop import train

# Around the rate that the range test suggests, which is rather too low than too high: where the loss stands still at
# first, as with deep networks from scratch, by a factor of fifty. So the rate that people begin with is in it too.
BELOW, ABOVE = 4.0, 12.0
BELOW_USUAL, ABOVE_USUAL = 3.0, 10.0
FIRST_FACTORS = (1.0, 3.0)
BOLDER = 3.0
ALIKE = 1.5  # rates nearer to each other say the same
LOST = -math.inf  # the score of what diverged


@dataclass(frozen=True)
class Setting:
    """What is raced."""

    optimizer: Optimizer
    lr: float
    batch_size: int

    def like(self, other: Setting) -> bool:
        """Whether one of the two is as good as both."""
        same = (self.optimizer, self.batch_size) == (other.optimizer, other.batch_size)
        return same and 1 / ALIKE < self.lr / other.lr < ALIKE

    def on(self, training: Training) -> Settled:
        """The training with this setting."""
        return training.settled(optimizer=self.optimizer, lr=self.lr, batch_size=self.batch_size)


@dataclass(frozen=True)
class Run:
    """One short training of one setting and what came of it."""

    setting: Setting
    round: int
    samples: int
    metric: float | None
    loss: float | None

    def row(self) -> dict[str, float | int | str | None]:
        """For a report. The metric is negative where lower is better."""
        return {
            "optimizer": self.setting.optimizer,
            "lr": self.setting.lr,
            "batch_size": self.setting.batch_size,
            "round": self.round + 1,
            "samples": self.samples,
            "score": self.metric,
            "loss": self.loss,
        }

    @property
    def score(self) -> tuple[float, float]:
        """To be compared; larger is better. The loss decides among equals: small splits have many."""
        return (LOST if self.metric is None else self.metric, LOST if self.loss is None else -self.loss)


@dataclass(frozen=True)
class Space:
    """What may be raced: a rate for each optimizer at each batch size, which is a suggestion where `free_lr`.

    `usual` are the rates that people begin with, for the same.
    """

    suggested: dict[tuple[Optimizer, int], float]
    free_lr: bool
    usual: Mapping[tuple[Optimizer, int], float] = field(default_factory=dict)

    @property
    def optimizers(self) -> list[Optimizer]:
        return list(dict.fromkeys(optimizer for optimizer, _ in self.suggested))

    def bounds(self, optimizer: Optimizer, batch_size: int, training: Training) -> tuple[float, float]:
        """Between which rates one is sought."""
        middle = self.suggested[optimizer, batch_size]
        usual = self.usual.get((optimizer, batch_size), middle)
        most = highest(training.model_copy(update={"optimizer": optimizer}))
        lowest = min(middle / BELOW, usual / BELOW_USUAL)
        return lowest, max(middle, min(most, max(middle * ABOVE, usual * ABOVE_USUAL)))

    def first(self, optimizer: Optimizer, batch_size: int) -> list[float]:
        """The rates that a race begins with, which goes on to others from there."""
        middle = self.suggested[optimizer, batch_size]
        if not self.free_lr:
            return [middle]
        usual = self.usual.get((optimizer, batch_size))
        return [*([] if usual is None else [usual]), *(middle * factor for factor in FIRST_FACTORS)]

    @property
    def batch_sizes(self) -> list[int]:
        return sorted({size for _, size in self.suggested})


def race(context: Context, training: Training, space: Space, rounds: Sequence[Round], feed: Feed) -> list[Run]:
    """All runs in their order; the last round's best comes last. Settings are judged on `feed`'s validation split.

    Candidates are proposed by a tree-structured Parzen estimator (Bergstra 2011), the suggestions first.
    """
    study = _study(space, context.seed, training)
    runs: list[Run] = []
    alive: list[Setting] = []
    for number, one in enumerate(rounds):
        begun = len(runs)
        for i in range(one.candidates):
            trial = None if number else study.ask()
            setting = alive[i] if trial is None else _setting(trial, space, training)
            runs.append(_run(context, training, setting, number, one.samples, feed))
            if trial is not None:
                study.tell(trial, *_told(runs[-1]))
        scores = [run.score for run in runs[begun:]]
        following = rounds[number + 1].candidates if number + 1 < len(rounds) else 1
        alike = [[one.like(other) for other in _settings(runs[begun:])] for one in _settings(runs[begun:])]
        alive = [runs[begun + i].setting for i in survivors(scores, following, alike)]
        bolder = beyond(alive[0], _settings(runs), highest(alive[0].on(training)))
        if bolder is not None and following > 1:
            alive[-1] = bolder
    return runs


def beyond(best: Setting, tried: Sequence[Setting], most: float) -> Setting | None:
    """A higher rate than any that was tried, where that one is the best: the bounds were a guess. None elsewhere."""
    same = [one.lr for one in tried if (one.optimizer, one.batch_size) == (best.optimizer, best.batch_size)]
    if best.lr * ALIKE < max(same) or best.lr * ALIKE > most:
        return None
    return replace(best, lr=min(most, best.lr * BOLDER))


def winner(runs: Sequence[Run]) -> Setting:
    """The best of the last round."""
    last = [run for run in runs if run.round == runs[-1].round]
    return max(last, key=lambda run: run.score).setting


def _study(space: Space, seed: int, training: Training) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    # Smaller batches first, each optimizer in turn: where the budget is short, the rest is left out.
    for batch_size in space.batch_sizes:
        rates = {name: space.first(name, batch_size) for name in space.optimizers}
        for name, rate in (
            pair for turn in zip(*rates.values(), strict=True) for pair in zip(rates, turn, strict=True)
        ):
            place = {"optimizer": space.optimizers.index(name), "batch_size": space.batch_sizes.index(batch_size)}
            lowest, most = space.bounds(name, batch_size, training)
            share = math.log(rate / lowest) / math.log(most / lowest)
            study.enqueue_trial(place | {"share": min(1.0, max(0.0, share))})
    return study


def _settings(runs: Sequence[Run]) -> list[Setting]:
    return [run.setting for run in runs]


def _setting(trial: optuna.Trial, space: Space, training: Training) -> Setting:
    optimizer = space.optimizers[trial.suggest_categorical("optimizer", range(len(space.optimizers)))]
    size = space.batch_sizes[trial.suggest_categorical("batch_size", range(len(space.batch_sizes)))]
    if not space.free_lr:
        return Setting(optimizer, space.suggested[optimizer, size], size)
    lowest, most = space.bounds(optimizer, size, training)
    return Setting(optimizer, lowest * (most / lowest) ** trial.suggest_float("share", 0, 1), size)


def _told(run: Run) -> tuple[float | None, optuna.trial.TrialState]:
    if run.metric is None or not math.isfinite(run.metric):
        return None, optuna.trial.TrialState.FAIL
    return run.metric, optuna.trial.TrialState.COMPLETE


def _run(context: Context, training: Training, setting: Setting, number: int, samples: int, feed: Feed) -> Run:
    """Trains a copy with a whole schedule of `samples` samples, and judges it."""
    trial = rehearsal(context, feed)
    steps = max(1, -(-samples // setting.batch_size))
    short = brief(setting.on(training), steps)
    sign = 1 if TASKS[context.model.facts.task].higher_is_better else -1
    try:
        summary = train(trial, short)
        metric, _ = feed.score(_forward(trial), "validation")
    except TrainingDiverged:
        return Run(setting, number, steps * setting.batch_size, None, None)
    return Run(setting, number, steps * setting.batch_size, sign * metric, summary.last_epoch_loss)


def _forward(trial: Context) -> Forward:
    module = trial.model.module
    return lambda inputs: module(*(tensor.to(trial.device) for tensor in inputs))
