"""Settings that find themselves, on real digits: what is found is good, said, and never changes the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.contract.distillation import Distill
from app.contract.spec import Prune
from app.contract.training import Search, Training
from tests.worker.helpers import MemorySplit, context_for, digits_data, memory_data, mlp, tiny_model
from worker.checkpoints.points import Checkpoints
from worker.constraints import masks
from worker.context import Context
from worker.data.base import Data
from worker.data.splits import Part
from worker.techniques.pruning.prune import PruneTechnique
from worker.training.finding import throughput
from worker.training.finding.judging import judged
from worker.training.finding.race import Setting, Space, beyond
from worker.training.finding.range_test import range_test
from worker.training.finding.settle import longer, rescaled, settle, usual
from worker.training.finding.throughput import Load, fastest, loads
from worker.training.loop import train


@pytest.fixture(scope="module")
def digits() -> Data:
    return digits_data()


def context_of(data: Data, scratch: Path, module: nn.Module | None = None, seed: int = 0) -> Context:
    return context_for(tiny_model(module or mlp()), data, scratch, seed=seed)


def weights(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


def accuracy(context: Context) -> float:
    assert context.feed is not None
    module = context.model.module.eval()
    return context.feed.score(lambda inputs: module(*inputs), "test")[0]


def test_settled_trainings_stay_as_they_are(digits: Data, tmp_path: Path) -> None:
    training = Training(epochs=2, optimizer="sgd", lr=0.1, batch_size=32)
    found, details = settle(context_of(digits, tmp_path), training)
    assert found.model_dump() == training.model_dump()
    assert details == {}


def test_a_range_test_finds_rates_that_train_and_leaves_the_model_alone(digits: Data, tmp_path: Path) -> None:
    context = context_of(digits, tmp_path)
    before = weights(context.model.module)
    for name in ("adamw", "sgd"):
        curve = range_test(context, Training(epochs=5, optimizer=name).settled())
        assert curve.rates[0] == 1e-6
        assert len(curve.rates) == len(curve.losses)
        assert min(curve.losses) < curve.losses[0] - 0.3  # it went to where the loss falls
        trained = context_of(digits, tmp_path)
        train(trained, Training(epochs=5, optimizer=name, lr=curve.suggested))
        assert accuracy(trained) > 0.85  # 5 epochs at the suggested rate; at a tenth of sgd's it is 0.5
    assert all(torch.equal(a, b) for a, b in zip(before, weights(context.model.module), strict=True))


def test_everything_is_found_within_the_budget_and_reported(digits: Data, tmp_path: Path) -> None:
    context = context_of(digits, tmp_path)
    asked = Training.model_validate({"epochs": 6, "optimizer": "auto", "lr": "auto", "batch_size": "auto"})
    found, details = settle(context, asked)
    race = details["race"]
    assert isinstance(race, list)
    raced = sum(int(row["samples"] or 0) for row in race)
    assert raced <= 1.5 * 6 * 1000 + sum(int(row["batch_size"] or 0) for row in race)  # whole steps are taken
    last = [row for row in race if row["round"] == race[-1]["round"]]
    best = max(last, key=lambda row: (float(row["score"] or 0), -float(row["loss"] or 0)))
    assert (found.optimizer, found.batch_size) == (best["optimizer"], best["batch_size"])
    shorter = float(best["samples"] or 0) / (6 * 1000)
    assert found.lr == pytest.approx(float(best["lr"] or 0) * min(1.0, shorter) ** 0.5)
    assert max(float(row["lr"] or 0) for row in race if row["optimizer"] == "adamw") <= 0.1
    assert max(float(row["lr"] or 0) for row in race if row["optimizer"] == "sgd") <= 1.0 + 1e-9
    assert {row["optimizer"] for row in race} == {"adamw", "sgd"}
    assert {"lr_range_test_adamw", "lr_range_test_sgd", "batch_sizes", "search_samples"} <= set(details)
    train(context, found)
    assert accuracy(context) > 0.85  # which batch size is the fastest differs from run to run


def test_the_race_is_the_same_again_where_no_speed_is_measured(digits: Data, tmp_path: Path) -> None:
    asked = Training.model_validate({"epochs": 2, "optimizer": "auto", "lr": "auto", "search": {"budget": 1.5}})
    one, two = (settle(context_of(digits, tmp_path, seed=3), asked) for _ in range(2))
    assert one == two


def test_without_a_budget_the_suggestion_is_taken(digits: Data, tmp_path: Path) -> None:
    asked = Training(epochs=2, optimizer="adamw", lr="auto", search=Search(budget=0))
    found, details = settle(context_of(digits, tmp_path), asked)
    assert "race" not in details
    assert found.lr == range_test(context_of(digits, tmp_path), asked.settled(lr=1e-3)).suggested


def test_what_an_earlier_attempt_found_stands(digits: Data, tmp_path: Path) -> None:
    context = context_of(digits, tmp_path)
    asked = Training(epochs=2, optimizer="adamw", lr="auto", search=Search(budget=0))
    left: dict[str, Path] = {}

    def announce(kind: str, name: str) -> None:
        left[kind] = tmp_path / f"kept-{kind}"
        left[kind].write_bytes((tmp_path / name).read_bytes())

    context.checkpoints = Checkpoints(tmp_path, announce)
    found, details = settle(context, asked)
    train(context, found.model_copy(update={"checkpoint_steps": 3}))

    again = context_of(digits, tmp_path, mlp(seed=9))  # another network, for which another rate would be found
    again.checkpoints = Checkpoints(tmp_path, saved=left)
    assert settle(again, asked) == (found, details)


def test_masks_hold_in_the_copies_too(digits: Data, tmp_path: Path) -> None:
    context = context_of(digits, tmp_path)
    asked = Training(epochs=1, lr="auto", optimizer="adamw", search=Search(budget=0))
    details = PruneTechnique().apply(Prune(sparsity=0.8, training=asked), context)
    assert details["found_lr"] != 1e-3
    for name, mask in masks(context.model.module).items():
        weight = context.model.module.get_submodule(name.rpartition(".")[0]).weight
        assert not weight[~mask].any()


def test_settings_are_judged_on_what_their_training_does_not_see(digits: Data, tmp_path: Path) -> None:
    alone = dataclasses.replace(digits, splits={"train": digits.splits["train"]})
    feed = judged(context_of(alone, tmp_path))
    assert feed is not None
    train_part, held = feed.data.splits["train"], feed.data.splits["validation"]
    assert isinstance(train_part, Part)
    assert isinstance(held, Part)
    assert len(held) == 100
    assert sorted([*train_part.rows, *held.rows]) == list(range(1000))
    given = judged(context_of(digits, tmp_path))
    assert given is not None
    assert (given.size("train"), given.size("validation")) == (1000, 250)


def test_batch_sizes_double_within_what_the_data_and_the_memory_allow(digits: Data, tmp_path: Path) -> None:
    context = context_of(digits, tmp_path)
    training = Training(epochs=1).settled()
    sizes = [load.batch_size for load in loads(context, training, 1000)]
    assert sizes == [8 * 2**i for i in range(len(sizes))]
    assert sizes[-1] <= 1000 // throughput.LEAST_STEPS
    context.memory_bytes = 1  # nothing fits, and something has to be taken
    assert [load.batch_size for load in loads(context, training, 1000)] == [8]


def test_the_smallest_of_nearly_the_fastest_is_taken() -> None:
    speeds = [(8, 100.0), (16, 190.0), (32, 300.0), (64, 310.0), (128, 312.0)]
    assert fastest([Load(size, speed, 0) for size, speed in speeds]).batch_size == 32


@pytest.mark.parametrize(("optimizer", "expected"), [("sgd", 0.4), ("adamw", 0.2)])
def test_rates_grow_with_the_batch(optimizer: Any, expected: float) -> None:
    assert rescaled(0.1, optimizer, 64, 256) == pytest.approx(expected)


def test_settings_that_are_given_are_raced_once_each(digits: Data, tmp_path: Path) -> None:
    asked = Training(epochs=3, optimizer="auto", lr=0.01, batch_size=32)
    _, details = settle(context_of(digits, tmp_path), asked)
    race = details["race"]
    assert isinstance(race, list)
    begun = [(row["optimizer"], row["lr"], row["batch_size"]) for row in race if row["round"] == 1]
    assert begun == [("adamw", 0.01, 32), ("sgd", 0.01, 32)]


def test_without_labels_the_suggestion_is_taken(digits: Data, tmp_path: Path) -> None:
    split = digits.splits["train"]
    assert isinstance(split, MemorySplit)
    context = context_of(memory_data({"train": (split.inputs, None)}), tmp_path, mlp(seed=1))
    context.teacher = mlp(seed=2).eval()
    found, details = settle(context, Training(epochs=2, lr="auto", optimizer="adamw", distill=Distill()))
    assert "race" not in details
    assert train(context, found).teacher_alone


@pytest.mark.parametrize(("raced", "samples", "factor"), [(100, 400, 0.5), (400, 400, 1.0), (500, 400, 1.0)])
def test_longer_trainings_take_lower_rates(raced: int, samples: int, factor: float) -> None:
    assert longer(raced, samples) == factor


def test_rates_are_sought_below_the_highest() -> None:
    space = Space({("adamw", 8): 0.02, ("sgd", 8): 0.05, ("adamw", 64): 0.4}, free_lr=True)
    training = Training()
    assert space.bounds("adamw", 8, training) == (0.005, 0.03)
    assert space.bounds("sgd", 8, training) == (0.0125, pytest.approx(0.6))
    assert space.bounds("sgd", 8, Training(optimizer="sgd", momentum=0.99)) == (0.0125, pytest.approx(0.1))
    assert space.bounds("adamw", 64, training) == (0.1, 0.4)  # what was suggested is not cut off


def test_what_people_begin_with_is_raced_wherever_the_range_test_points() -> None:
    """Where a loss stands still at first, the test suggests a fiftieth of what trains."""
    space = Space({("adamw", 64): 1e-5}, free_lr=True, usual={("adamw", 64): 1e-3})
    lowest, most = space.bounds("adamw", 64, Training())
    assert (lowest, most) == (pytest.approx(2.5e-6), pytest.approx(1e-2))
    assert space.first("adamw", 64) == [1e-3, 1e-5, pytest.approx(3e-5)]
    assert dataclasses.replace(space, free_lr=False).first("adamw", 64) == [1e-5]


def test_usual_rates() -> None:
    assert usual("sgd", 0.9) == pytest.approx(0.01)
    assert (usual("adamw", 0.9), usual("adadelta", 0.0)) == (1e-3, 1.0)


def test_beyond_the_highest_rate_that_was_tried_lies_another() -> None:
    best = Setting("sgd", 0.1, 32)
    others = [Setting("sgd", 0.01, 32), Setting("adamw", 0.02, 32), Setting("sgd", 0.3, 64)]
    assert beyond(best, [best, *others], 1.0) == Setting("sgd", pytest.approx(0.3), 32)
    assert beyond(best, [best, *others], 0.2) == Setting("sgd", 0.2, 32)
    assert beyond(best, [best, *others], 0.1) is None
    assert beyond(best, [best, *others, Setting("sgd", 0.4, 32)], 1.0) is None
