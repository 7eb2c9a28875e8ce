"""A training whose weights are shared out is the training of one process, but for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from app.contract.optimizing import Optimizer
from tests.worker.ranks import works
from tests.worker.ranks.together import together
from tests.worker.ranks.works import Case, Outcome

CASES = {
    "mlp": Case("mlp", {"epochs": 2, "lr": 0.01}, sharded=True),
    "clipped, in parts": Case(
        "mlp",
        {"epochs": 1, "micro_batch_size": 5, "clip_norm": 0.3, "weight_decay": 0.1, "layer_decay": 0.5},
        sharded=True,
    ),
    "fewer samples than processes": Case("mlp", {"epochs": 2, "batch_size": 83}, sharded=True),
    "convolutions, BatchNorm": Case("convnet", {"epochs": 2, "lr": 0.01, "optimizer": "sgd"}, sharded=True),
    "blocks, tied": Case("stacked", {"epochs": 2, "lr": 0.003}, sharded=True),
    "unused weights": Case("partly used", {"steps": 5}, sharded=True),
    "masked": Case("mlp", {"steps": 8, "lr": 0.01}, sharded=True, masked=True),
    "ema, early": Case(
        "mlp", {"epochs": 4, "lr": 0.03, "early_stopping": {"patience": 1}, "averaging": {"kind": "ema"}}, sharded=True
    ),
    "swa, BatchNorm": Case(
        "mlp with BatchNorm", {"epochs": 3, "lr": 0.03, "averaging": {"kind": "swa", "start": 0.5}}, sharded=True
    ),
    "diverging": Case("mlp", {"epochs": 2, "lr": 100.0, "divergence_retries": 6, "checkpoint_steps": 2}, sharded=True),
    "bf16": Case("convnet", {"steps": 4, "precision": "bf16"}, sharded=True),
}
CASES |= {
    name: Case("mlp", {"steps": 6, "optimizer": name}, sharded=True)
    for name in get_args(Optimizer)
    if name != "adafactor"
}
TOLERANCE = {"bf16": 0.01, "diverging": 1e-2}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Outcome]]]:
    """By the number of processes, and by rank."""
    folder = tmp_path_factory.mktemp("sharded")
    return {
        size: together(size, folder / f"{size}", works.trainings, folder / f"scratch-{size}", CASES)
        for size in (1, 2, 3)
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_the_curve_of_losses_is_that_of_one_process(
    size: int, name: str, outcomes: dict[int, list[dict[str, Outcome]]]
) -> None:
    found, expected = outcomes[size][0][name], outcomes[1][0][name]
    assert len(found.losses) == len(expected.losses)
    tolerance = TOLERANCE.get(name, 1e-5)
    assert found.losses == pytest.approx(expected.losses, abs=tolerance, rel=tolerance)
    metric = "training_best_validation_metric"
    assert found.details.get(metric) == pytest.approx(expected.details.get(metric), abs=0.015)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_all_processes_end_with_whole_weights_and_the_same_bits(
    size: int, name: str, outcomes: dict[int, list[dict[str, Outcome]]]
) -> None:
    first, *others = (one[name].state for one in outcomes[size])
    assert {key: value.shape for key, value in first.items()} == {
        key: value.shape for key, value in outcomes[1][0][name].state.items()
    }
    assert all(type(value) is torch.Tensor for value in first.values())
    for other in others:
        assert [key for key in first if not torch.equal(first[key], other[key])] == []


def test_masks_hold(outcomes: dict[int, list[dict[str, Outcome]]]) -> None:
    weight = outcomes[2][0]["masked"].state["0.weight"]
    assert float((weight == 0).float().mean()) == 0.5


def test_each_holds_its_share_alone(tmp_path: Path) -> None:
    """Of weights, gradients and what the optimizer keeps: a quarter each, but for what does not divide."""
    whole, *_ = together(1, tmp_path / "1", works.held, False)
    for share in together(4, tmp_path / "4", works.held, True):
        assert share["released"] == 0
        for what in ("weights", "gradients", "optimizer"):
            assert share[what] == pytest.approx(whole[what] / 4, rel=0.1)
