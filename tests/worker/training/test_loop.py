"""The training loop: what it computes, that it repeats itself, when it stops and when it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from app.contract.distillation import Distill
from app.contract.errors import DatasetMismatch, InvalidSpec, TrainingDiverged, Unsupported
from app.contract.optimizing import Ema, Optimizer, Swa
from app.contract.scheduling import Schedule
from app.contract.training import EarlyStopping, Training
from tests.worker.helpers import context_for, convnet, digits_data, memory_data, mlp, tiny_model
from worker.constraints import impose_mask, masks
from worker.context import Context
from worker.data.base import Data
from worker.training.loop import train

SAMPLES = 129  # two batches of 64 and a single sample left over


@pytest.fixture(scope="module")
def digits() -> Data:
    return digits_data()


def few(digits: Data, samples: int = SAMPLES) -> Data:
    """The first training samples, and 64 others for validation."""
    raw = digits.splits["train"].read(range(samples + 64))
    assert isinstance(raw.inputs, dict)
    assert raw.targets is not None
    inputs, targets = raw.inputs["input"], raw.targets
    return memory_data({"train": (inputs[:samples], targets[:samples]), "validation": (inputs[-64:], targets[-64:])})


def context_of(module: nn.Module, data: Data | None, scratch: Path, seed: int = 0) -> Context:
    return context_for(tiny_model(module), data, scratch, seed=seed)


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in module.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def decayed_apart(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Groups as a user of torch writes them: biases do not decay."""
    weights = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    biases = [parameter for parameter in module.parameters() if parameter.dim() == 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]


OPTIMIZERS: dict[str, tuple[dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": ({}, lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)),
    "nesterov": (
        {"optimizer": "sgd", "momentum": 0.8, "nesterov": True},
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.8, nesterov=True),
    ),
    "adam": ({"betas": (0.8, 0.9)}, lambda groups: torch.optim.Adam(groups, lr=0.1, betas=(0.8, 0.9))),
    "adamw": ({}, lambda groups: torch.optim.AdamW(groups, lr=0.1)),
    "rmsprop": ({"momentum": 0.5}, lambda groups: torch.optim.RMSprop(groups, lr=0.1, momentum=0.5)),
    "adagrad": ({}, lambda groups: torch.optim.Adagrad(groups, lr=0.1)),
    "adadelta": ({}, lambda groups: torch.optim.Adadelta(groups, lr=0.1)),
    "nadam": ({"betas": (0.8, 0.9)}, lambda groups: torch.optim.NAdam(groups, lr=0.1, betas=(0.8, 0.9))),
    "radam": ({}, lambda groups: torch.optim.RAdam(groups, lr=0.1)),
    "adafactor": ({}, lambda groups: torch.optim.Adafactor(groups, lr=0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_as_a_loop_written_by_hand(digits: Data, tmp_path: Path, name: str) -> None:
    data = few(digits)
    fields, reference_of = OPTIMIZERS[name]
    optimizer_fields = {"optimizer": name} | fields
    training = Training(
        epochs=3, lr=0.1, weight_decay=0.01, schedule="cosine", clip_norm=0.5, divergence_retries=0, **optimizer_fields
    )
    context = context_of(mlp(), data, tmp_path, seed=3)
    summary = train(context, training)

    reference = mlp()
    optimizer = reference_of(decayed_apart(reference, 0.01))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    order = torch.Generator().manual_seed(3)
    raw = data.splits["train"].read(range(SAMPLES))
    assert isinstance(raw.inputs, dict)
    assert isinstance(raw.targets, torch.Tensor)
    for _ in range(3):
        for chosen in torch.randperm(SAMPLES, generator=order).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(reference(raw.inputs["input"][chosen]), raw.targets[chosen])
            loss.backward()
            nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
    assert summary.steps == 9
    for ours, theirs in zip(weights(context.model.module), weights(reference), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("distill", [None, Distill()])
def test_the_same_seed_gives_equal_bits_and_another_seed_does_not(
    digits: Data, tmp_path: Path, distill: Distill | None
) -> None:
    def run(seed: int, disturb: int) -> list[torch.Tensor]:
        context = context_of(mlp(norm=True, dropout=0.3), few(digits), tmp_path, seed=seed)
        torch.manual_seed(disturb)  # what the process drew before must not matter
        train(context, Training(epochs=2, distill=distill))
        return weights(context.model.module)

    assert same(run(7, disturb=1), run(7, disturb=2))
    assert not same(run(7, disturb=1), run(8, disturb=1))


def test_the_random_state_of_the_process_is_left_alone(digits: Data, tmp_path: Path) -> None:
    context = context_of(mlp(dropout=0.3), few(digits), tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(context, Training(epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_validation_does_not_change_what_is_trained(digits: Data, tmp_path: Path) -> None:
    def at_the_last_step(stopping: EarlyStopping | None) -> list[torch.Tensor]:
        context = context_of(mlp(norm=True, dropout=0.3), few(digits), tmp_path)
        seen: list[list[torch.Tensor]] = []

        def record(step: int, total: int) -> bool:
            seen.append(weights(context.model.module))
            return True

        train(context, Training(epochs=3, early_stopping=stopping), record)
        return seen[-1]

    assert same(at_the_last_step(None), at_the_last_step(EarlyStopping(patience=10)))


def test_steps_are_counted_and_reported(digits: Data, tmp_path: Path) -> None:
    context = context_of(mlp(), few(digits), tmp_path)
    progress: list[float] = []
    context.progress = progress.append
    seen: list[tuple[int, int]] = []

    def record(step: int, total: int) -> bool:
        seen.append((step, total))
        return True

    summary = train(context, Training(steps=7), record)
    assert summary.steps == 7
    assert summary.epochs == pytest.approx(7 / 3)
    assert seen == [(step, 7) for step in range(7)]
    assert progress[:7] == pytest.approx([(step + 1) / 7 for step in range(7)])
    assert not context.model.module.training
    assert set(summary.details()) == {
        "training_steps",
        "training_epochs",
        "training_first_epoch_loss",
        "training_last_epoch_loss",
    }


def test_batch_norm_does_not_get_a_single_left_over_sample(digits: Data, tmp_path: Path) -> None:
    context = context_of(mlp(norm=True), few(digits), tmp_path)
    before = weights(context.model.module)
    summary = train(context, Training(epochs=2))
    assert summary.steps == 4
    norm = context.model.module.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 4  # trained in train mode, its statistics move
    assert not same(before, weights(context.model.module))


def test_a_network_without_batch_norm_sees_every_sample(digits: Data, tmp_path: Path) -> None:
    assert train(context_of(mlp(), few(digits), tmp_path), Training(epochs=2)).steps == 6


def test_batch_norm_on_batches_of_one_is_refused_with_advice(digits: Data, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="batch_size of 2"):
        train(context_of(mlp(norm=True), few(digits), tmp_path), Training(batch_size=1))


def test_early_stopping_stops_and_keeps_the_best_epoch(digits: Data, tmp_path: Path) -> None:
    data = few(digits)
    context = context_of(mlp(norm=True), data, tmp_path)
    ends: list[list[torch.Tensor]] = []

    def record(step: int, total: int) -> bool:
        if step and step % 2 == 0:  # the first step of an epoch sees what the last one left
            ends.append(weights(context.model.module))
        return True

    rule = EarlyStopping(patience=2, min_delta=0.0)
    summary = train(context, Training(epochs=60, lr=0.02, early_stopping=rule), record)
    assert summary.stopped_early
    assert summary.best_epoch is not None
    assert summary.steps == 2 * (summary.best_epoch + 2)
    assert same(weights(context.model.module), ends[summary.best_epoch - 1])
    assert context.feed is not None
    measured, samples = context.feed.score(lambda inputs: context.model.module(*inputs), "validation")
    assert (measured, samples) == (summary.best_validation_metric, 64)
    assert summary.details()["training_best_epoch"] == summary.best_epoch


def test_no_epoch_is_judged_before_the_constraints_are_final(digits: Data, tmp_path: Path) -> None:
    context = context_of(mlp(), few(digits), tmp_path)
    rule = EarlyStopping(patience=1, min_delta=1.0)  # nothing but the first judged epoch is ever better
    summary = train(context, Training(epochs=10, early_stopping=rule), lambda step, total: step >= 12)
    assert summary.best_epoch == 5  # three steps an epoch
    assert summary.steps == 18


def test_the_teacher_teaches_and_does_not_learn(digits: Data, tmp_path: Path) -> None:
    data = few(digits)
    teacher = context_of(mlp(seed=1, norm=True, dropout=0.5), data, tmp_path)
    train(teacher, Training(epochs=20, lr=0.01))
    frozen = weights(teacher.model.module)
    teacher.model.module.train()  # as a careless caller may leave it
    student = context_for(tiny_model(mlp()), data, tmp_path)
    student.teacher = teacher.model.module
    train(student, Training(epochs=40, lr=0.01, distill=Distill(alpha=1.0, temperature=2.0)))
    assert same(frozen, weights(teacher.model.module))
    raw = data.splits["validation"].read(range(64))
    assert isinstance(raw.inputs, dict)
    with torch.no_grad():
        said = teacher.model.module(raw.inputs["input"]).argmax(1)
        learnt = student.model.module(raw.inputs["input"]).argmax(1)
    assert (said == learnt).float().mean() >= 0.85


# Rates at which each learns a small network within five epochs; those left out take their default times three.
RATES = {"sgd": 0.05, "radam": 0.03, "rmsprop": 3e-4, "adagrad": 0.03, "adadelta": 1.0, "adafactor": 0.03}


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_every_optimizer_learns_the_digits(digits: Data, tmp_path: Path, optimizer: Optimizer) -> None:
    context = context_of(mlp(), digits, tmp_path)
    summary = train(context, Training(epochs=5, optimizer=optimizer, lr=RATES.get(optimizer, 3e-3)))
    assert summary.last_epoch_loss < summary.first_epoch_loss / 2
    assert context.feed is not None
    assert context.feed.score(lambda inputs: context.model.module(*inputs), "test")[0] > 0.85


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_every_optimizer_runs_under_every_schedule(
    digits: Data, tmp_path: Path, optimizer: Optimizer, schedule: Schedule
) -> None:
    """With all else that can be combined."""
    warm = {} if schedule == "one_cycle" else {"warmup_share": 0.2}
    cuts = {"milestones": (1, 2)} if schedule == "multi_step" else {}
    training = Training(
        epochs=3,
        optimizer=optimizer,
        schedule=schedule,
        layer_decay=0.9,
        weight_decay=0.01,
        clip_norm=1.0,
        micro_batch_size=24,
        precision="bf16",
        averaging=Ema(),
        **warm,
        **cuts,
    )
    context = context_of(mlp(norm=True, dropout=0.1), few(digits), tmp_path)
    before = weights(context.model.module)
    summary = train(context, training)
    assert (summary.steps, summary.diverged) == (6, ())
    assert summary.details()["training_precision"] == "bfloat16"
    assert not same(before, weights(context.model.module))


def test_a_convolutional_network_learns_the_digits(tmp_path: Path) -> None:
    context = context_for(tiny_model(convnet(), shape=(1, 8, 8)), digits_data((1, 8, 8)), tmp_path)
    train(context, Training(epochs=12, lr=0.01, schedule="one_cycle"))
    assert context.feed is not None
    assert context.feed.score(lambda inputs: context.model.module(*inputs), "test")[0] > 0.9


def test_a_training_that_diverges_goes_back_and_on_with_a_lower_rate(digits: Data, tmp_path: Path) -> None:
    context = context_of(mlp(), few(digits), tmp_path)
    training = Training(epochs=30, optimizer="adam", lr=30.0, checkpoint_steps=10)
    summary = train(context, training)
    assert 1 <= len(summary.diverged) <= 4
    assert summary.last_epoch_loss < 1.0
    rates = [incident["learning_rate"] for incident in summary.diverged]
    assert rates == pytest.approx([30.0 / 4**n for n in range(len(rates))])
    assert all("loss" in incident["what"] or "weight" in incident["what"] for incident in summary.diverged)
    assert summary.details()["training_diverged"] == list(summary.diverged)
    assert not any(tmp_path.iterdir())
    again = context_of(mlp(), few(digits), tmp_path)
    train(again, training)
    assert same(weights(context.model.module), weights(again.model.module))


@pytest.mark.parametrize(
    ("retries", "rate", "after"), [(0, 100, r"\)\."), (2, 6.25, r"\), and 2 lower rates had not helped\.")]
)
def test_a_loss_that_diverges_all_the_same_names_step_and_rate(
    digits: Data, tmp_path: Path, retries: int, rate: float, after: str
) -> None:
    context = context_of(mlp(), few(digits), tmp_path)
    training = Training(epochs=100, optimizer="sgd", lr=100.0, weight_decay=10.0, divergence_retries=retries)
    with pytest.raises(
        TrainingDiverged,
        match=rf"The training loss .* at step \d+ of 300, at a learning rate of {rate:g} \(sgd{after}",
    ):
        train(context, training)
    assert not context.model.module.training
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("retries", [0, 1])
def test_a_weight_that_diverges_in_the_last_step_is_noticed(digits: Data, tmp_path: Path, retries: int) -> None:
    context = context_of(mlp(), few(digits), tmp_path)
    hook = context.model.module.get_parameter("0.bias").register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingDiverged, match=r"weight became infinite .* at a learning rate of 0\.00"):
        train(context, Training(steps=1, schedule="linear", divergence_retries=retries))
    hook.remove()


def test_masks_that_came_before_the_training_diverged_come_again(digits: Data, tmp_path: Path) -> None:
    """What a schedule of pruning imposed is undone with the rest, and imposed again on the way."""
    context = context_of(mlp(), few(digits), tmp_path)
    seen: list[tuple[int, int]] = []

    def prune(step: int, total: int) -> bool:
        value = context.model.module.get_parameter("2.weight") if step == 0 and not seen else None
        if step in (6, 12):
            mask = torch.ones(32, 64)
            mask[:, :step] = 0
            impose_mask(context.model.module, "2.weight", mask)
        if value is None and step == 14 and len(seen) < 15:
            with torch.no_grad():
                context.model.module[4].weight.fill_(torch.nan)  # type: ignore[index]
        kept = masks(context.model.module).get("2.weight", torch.ones(1))
        seen.append((step, int((~kept.bool()).sum())))
        return step >= 12

    summary = train(context, Training(steps=20, checkpoint_steps=10), prune)
    assert [step for step, _ in seen] == [*range(15), *range(10, 20)]
    assert dict(seen[15:])[10] == 6 * 32  # and not the 12 that had been imposed when it went astray
    assert dict(seen[15:])[19] == 12 * 32
    assert len(summary.diverged) == 1


def test_early_stopping_and_averaging_deliver_what_was_judged(digits: Data, tmp_path: Path) -> None:
    context = context_of(mlp(norm=True), few(digits), tmp_path)
    training = Training(epochs=12, lr=0.02, early_stopping=EarlyStopping(patience=2), averaging=Ema(decay=0.9))
    summary = train(context, training)
    assert context.feed is not None
    measured, _ = context.feed.score(lambda inputs: context.model.module(*inputs), "validation")
    assert measured == summary.best_validation_metric


def test_a_plain_mean_is_delivered_with_its_own_batch_norm(digits: Data, tmp_path: Path) -> None:
    data = few(digits)
    seen: list[torch.Tensor] = []
    context = context_of(mlp(norm=True), data, tmp_path)

    def record(step: int, total: int) -> bool:
        seen.append(context.model.module.get_parameter("0.weight").detach().clone())
        return True

    # Every weight of the second half but the last, which no later step sees.
    train(context, Training(steps=8, averaging=Swa(start=0.5, every=1)), record)
    plain = context_of(mlp(norm=True), data, tmp_path)
    train(plain, Training(steps=8))
    last = plain.model.module.get_parameter("0.weight").detach()
    mean = torch.stack([*seen[5:], last]).mean(0)
    torch.testing.assert_close(context.model.module.get_parameter("0.weight").detach(), mean)
    norm = context.model.module.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_batches_tracked == 2  # of one pass without the single sample that is left over


def test_the_plateau_lowers_the_rate_by_the_validation_metric(digits: Data, tmp_path: Path) -> None:
    def last(patience: int) -> list[torch.Tensor]:
        context = context_of(mlp(), few(digits), tmp_path)
        training = Training(epochs=8, lr=1e-6, schedule="plateau", plateau_patience=patience, gamma=0.5)
        train(context, training)
        return weights(context.model.module)

    constant = context_of(mlp(), few(digits), tmp_path)
    train(constant, Training(epochs=8, lr=1e-6))
    assert same(last(patience=8), weights(constant.model.module))
    assert not same(last(patience=0), weights(constant.model.module))  # so small a rate betters nothing


def test_a_warm_up_longer_than_the_training_is_refused(digits: Data, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="warmup_steps are 6 and the whole training has 6"):
        train(context_of(mlp(), few(digits), tmp_path), Training(epochs=2, warmup_steps=6))


def test_fp16_without_cuda_is_refused(digits: Data, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="bf16 or auto"):
        train(context_of(mlp(), few(digits), tmp_path), Training(precision="fp16"))


@pytest.mark.parametrize("data", [None, memory_data({"test": (torch.ones(4, 64), torch.zeros(4, dtype=torch.int64))})])
def test_training_without_training_data_is_refused(tmp_path: Path, data: Data | None) -> None:
    with pytest.raises(DatasetMismatch, match="`train` split"):
        train(context_of(mlp(), data, tmp_path), Training())


def test_training_without_targets_is_refused(tmp_path: Path) -> None:
    data = memory_data({"train": (torch.ones(4, 64), None)})
    with pytest.raises(DatasetMismatch, match="no"):
        train(context_of(mlp(), data, tmp_path), Training())


def test_training_without_weights_is_refused(digits: Data, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no trainable weights"):
        train(context_of(nn.Sequential(nn.Flatten()), few(digits), tmp_path), Training())


def test_unrelated_errors_of_the_network_are_not_renamed(digits: Data, tmp_path: Path) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        train(context_of(Broken(), few(digits), tmp_path), Training())
