"""A training that was cut off goes on from its checkpoint, and ends with the bits of one that was not."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.contract.augmentation import Augmentation, Mixup
from app.contract.codebook import Codebook
from app.contract.distillation import Distill, HiddenStates, SoftTargets
from app.contract.optimizing import Ema, Swa
from app.contract.pruning import Prune, Regrowth
from app.contract.training import EarlyStopping, Training
from tests.worker.helpers import context_for, digits_data, memory_data, mlp, tiny_model
from worker.checkpoints.points import Checkpoints, Kind
from worker.constraints import baked
from worker.context import Context
from worker.data.base import Data
from worker.data.batch import Batch
from worker.objectives.classification import Classification
from worker.techniques.base import Details
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.quantization.quantize import QuantizeTechnique
from worker.training.loop import train
from worker.training.states import Unusable

EVERY = 4  # steps between two checkpoints; an epoch has six
Work = Callable[[Context], Details]


class Killed(BaseException):
    """Stands for the end of the process."""


class Noisy(Classification):
    """Draws from every generator there is: its own, torch's, NumPy's and Python's, as augmentations do."""

    def prepare(self, batch: Batch, random_: torch.Generator) -> Batch:
        noise = torch.randn(batch.inputs[0].shape, generator=random_) + torch.randn(1)
        noise += float(np.random.normal()) + random.random()
        return replace(batch, inputs=(batch.inputs[0] + 0.05 * noise,), indices=None)


@pytest.fixture(scope="module")
def data() -> Data:
    raw = digits_data().splits["train"].read(range(450))
    assert isinstance(raw.inputs, dict)
    assert isinstance(raw.targets, Tensor)
    x, y = raw.inputs["input"], raw.targets
    return memory_data({"train": (x[:385], y[:385]), "validation": (x[385:], y[385:])})  # one is left over


CONVOLUTIONS = "convolutions, "  # how a work begins that trains them: their weights lie otherwise in memory meanwhile


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
    body = [nn.Unflatten(1, (1, 8, 8)), first, nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), second, nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(32, 10))


def context_of(data: Data, scratch: Path, name: str = "") -> Context:
    module = convolutions() if name.startswith(CONVOLUTIONS) else mlp(norm=True, dropout=0.3)
    model = replace(tiny_model(module), task=Noisy())
    return context_for(model, data, scratch, seed=5)


def outcome(work: Work, context: Context) -> tuple[dict[str, Tensor], Details]:
    details = work(context)
    return baked(context.model.module).state_dict(), details


def cut_off(
    work: Work, data: Data, scratch: Path, after: int, saved: dict[str, Path], name: str = ""
) -> dict[str, Path]:
    """Runs until `after` steps have been reported; the checkpoints that were announced till then."""
    left: dict[str, Path] = dict(saved)

    def announce(kind: Kind, name: str) -> None:
        left[kind] = Path(shutil.copy(scratch / name, scratch / f"stored-{kind}-{after}"))

    context = context_of(data, scratch, name)
    context.checkpoints = Checkpoints(scratch, announce, 0.0, saved)
    steps = 0

    def count(share: float) -> None:
        nonlocal steps
        steps += 1
        if steps > after:
            raise Killed

    context.progress = count
    with pytest.raises(Killed):
        work(context)
    return left


def finetune(**fields: Any) -> Work:
    training = Training(**{"epochs": 5, "lr": 0.01, "checkpoint_steps": EVERY} | fields)
    return lambda context: train(context, training).details()


def prune(**fields: Any) -> Work:
    return lambda context: PruneTechnique().apply(Prune(**fields), context)


def share(**fields: Any) -> Work:
    return lambda context: QuantizeTechnique().apply(Codebook(**fields), context)


TRAINING = Training(epochs=5, lr=0.01, checkpoint_steps=EVERY)
WORKS: dict[str, Work] = {
    "plain": finetune(),
    "momentum, clipped, in parts": finetune(optimizer="sgd", lr=0.05, clip_norm=0.3, micro_batch_size=20),
    "adafactor, one rate a layer": finetune(optimizer="adafactor", layer_decay=0.7, weight_decay=0.01),
    "nadam, bf16": finetune(optimizer="nadam", precision="bf16"),
    "ema": finetune(averaging=Ema(decay=0.9)),
    "swa": finetune(averaging=Swa(start=0.3, every=2)),
    "early stopping": finetune(epochs=9, lr=0.05, early_stopping=EarlyStopping(patience=2), averaging=Ema()),
    "plateau": finetune(schedule="plateau", plateau_patience=0, gamma=0.5, lr=0.05),
    "diverging": finetune(lr=100.0, divergence_retries=6),
    "distilled": finetune(distill=Distill()),
    "distilled, with projections": finetune(distill=Distill(losses=(SoftTargets(), HiddenStates(projection="linear")))),
    "smoothed labels": finetune(label_smoothing=0.2),
    "mixed": finetune(augmentation=Augmentation(mixup=Mixup())),
    "mixed, distilled": finetune(augmentation=Augmentation(mixup=Mixup()), distill=Distill()),
    "one-shot pruning": prune(sparsity=0.7, training=TRAINING),
    "by threshold": prune(threshold=0.05, training=TRAINING.model_copy(update={"optimizer": "sgd", "lr": 0.1})),
    "cubic pruning": prune(
        sparsity=0.8,
        schedule="cubic",
        training=TRAINING.model_copy(update={"averaging": Ema(), "early_stopping": EarlyStopping(patience=5)}),
    ),
    "pruning in rounds": prune(sparsity=0.8, schedule="iterative", rounds=4, training=TRAINING),
    "movement": prune(sparsity=0.8, schedule="cubic", criterion="movement", training=TRAINING),
    "variational": prune(sparsity=0.8, schedule="cubic", criterion="variational", training=TRAINING),
    "regrowth": prune(sparsity=0.8, regrow=Regrowth(every=EVERY), training=TRAINING),
    "cubic and regrowth": prune(sparsity=0.8, schedule="cubic", regrow=Regrowth(every=3), training=TRAINING),
    "codebook": share(entries=6, training=TRAINING),
    "codebook found again": share(entries=6, assignment="reestimated", training=TRAINING),
    "rewound rate": prune(
        sparsity=0.8,
        schedule="iterative",
        rounds=3,
        rewind="learning_rate",
        training=Training(steps=9, checkpoint_steps=EVERY),
    ),
    "rewound weights": prune(
        sparsity=0.8,
        schedule="iterative",
        rounds=3,
        rewind="weights",
        training=Training(steps=9, checkpoint_steps=EVERY),
    ),
}
WORKS |= {
    CONVOLUTIONS + name: WORKS[name]
    for name in ("plain", "ema", "distilled", "one-shot pruning", "cubic pruning", "regrowth", "codebook found again")
}
# After the first checkpoint alone; in the middle of an epoch; twice.
CUTS = [(2,), (15,), (9, 12)]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", WORKS)
def test_a_resumed_training_ends_with_equal_bits(name: str, cuts: tuple[int, ...], data: Data, tmp_path: Path) -> None:
    work = WORKS[name]
    expected, told = outcome(work, context_of(data, tmp_path, name))
    saved: dict[str, Path] = {}
    for after in cuts:
        folder = tmp_path / f"attempt-{after}"
        folder.mkdir()
        torch.manual_seed(after)  # another process has other random numbers
        saved = cut_off(work, data, folder, after, saved, name)
    assert saved
    context = context_of(data, tmp_path, name)
    context.checkpoints = Checkpoints(tmp_path, None, 0.0, saved)
    steps: list[float] = []
    context.progress = steps.append
    found, details = outcome(work, context)
    if name.startswith("rewound"):  # the report of the last training says nothing of those before
        details.pop("training_resumed_at_step", None)
        assert len(steps) < 30 if sum(cuts) > EVERY else len(steps) == 30
    else:
        resumed_at = details.pop("training_resumed_at_step")
        assert isinstance(resumed_at, int)
        assert resumed_at % EVERY == 0
        assert resumed_at > 0 or sum(cuts) <= EVERY or name == "diverging"
    assert details == told
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def test_it_can_fail(data: Data, tmp_path: Path) -> None:
    """The same comparison notices what a checkpoint forgets: here, the random numbers."""
    work = WORKS["plain"]
    expected, _ = outcome(work, context_of(data, tmp_path))
    saved = cut_off(work, data, tmp_path, 15, {})
    context = context_of(data, tmp_path)
    context.checkpoints = Checkpoints(tmp_path, None, 0.0, saved)
    waiting = context.checkpoints._saved["training"]
    waiting["random"]["torch"] = torch.Generator().manual_seed(1).get_state()
    found, _ = outcome(work, context)
    assert any(not torch.equal(found[key], expected[key]) for key in found)


OTHERS = {"optimizer": {"optimizer": "sgd"}, "averaging": {"averaging": Ema()}, "length": {"epochs": 6}}


@pytest.mark.parametrize("other", OTHERS)
def test_the_state_of_another_training_is_refused(other: str, data: Data, tmp_path: Path) -> None:
    saved = cut_off(WORKS["plain"], data, tmp_path, 15, {})
    context = context_of(data, tmp_path)
    context.checkpoints = Checkpoints(tmp_path, None, 0.0, saved)
    with pytest.raises(Unusable, match="other options"):
        finetune(**OTHERS[other])(context)


def test_the_state_of_another_network_is_refused_before_anything_is_changed(data: Data, tmp_path: Path) -> None:
    saved = cut_off(WORKS["plain"], data, tmp_path, 15, {})
    other = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    before = [parameter.detach().clone() for parameter in other.parameters()]
    context = context_for(tiny_model(other), data, tmp_path)
    context.checkpoints = Checkpoints(tmp_path, None, 0.0, saved)
    with pytest.raises(Unusable, match="nothing for"):
        WORKS["plain"](context)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_random_state_of_the_process_is_left_alone(data: Data, tmp_path: Path) -> None:
    def drawn() -> tuple[float, float, float]:
        return float(torch.rand(1)), float(np.random.random()), random.random()

    def seed() -> None:
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)

    context = context_of(data, tmp_path)
    seed()
    expected = drawn()
    seed()
    WORKS["plain"](context)
    assert drawn() == expected
