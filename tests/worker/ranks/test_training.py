"""A training in several processes is the training in one, but for rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.contract.distillation import Distill, HiddenStates, SoftTargets
from app.contract.pruning import Prune, Regrowth
from app.contract.spec import DistillStep, Finetune, Step
from app.contract.training import EarlyStopping, Training
from tests.worker.ranks import works
from tests.worker.ranks.together import together
from tests.worker.ranks.works import Case, Outcome

# 333 samples: no batch size divides them, and 3 processes share a last batch of 13, of 5 and of 1.
CASES = {
    "adam": Case("mlp", {"epochs": 3, "batch_size": 64, "lr": 0.01}),
    "in parts": Case("mlp", {"epochs": 2, "micro_batch_size": 5, "optimizer": "sgd", "lr": 0.1, "clip_norm": 0.5}),
    "fewer samples than processes": Case("mlp", {"epochs": 2, "batch_size": 83}),
    "BatchNorm": Case("mlp with BatchNorm", {"epochs": 2, "batch_size": 82, "lr": 0.01}),
    "BatchNorm, one left over": Case("mlp with BatchNorm", {"epochs": 2, "batch_size": 83, "lr": 0.01}),
    "BatchNorm, too few for all": Case("mlp with BatchNorm", {"epochs": 2, "batch_size": 331, "lr": 0.01}),
    "convolutions": Case("convnet", {"epochs": 2, "batch_size": 64, "lr": 0.01, "optimizer": "sgd"}),
    "unused weights": Case("partly used", {"steps": 5}),
    "a mask on the way": Case("mlp", {"steps": 8, "lr": 0.01}, mask_at=3),
    "inputs at random": Case("mlp", {"epochs": 2}, noisy=True),
    "augmented": Case(
        "convnet",
        {
            "epochs": 2,
            "augmentation": {"crop": {"padding": 1}, "erase": {}, "mixup": {"probability": 0.5}, "cutmix": {}},
            "label_smoothing": 0.1,
        },
    ),
    "averaged, early": Case(
        "mlp with BatchNorm",
        {"epochs": 4, "lr": 0.03, "early_stopping": {"patience": 1}, "averaging": {"kind": "ema", "decay": 0.9}},
    ),
    "swa": Case("mlp with BatchNorm", {"epochs": 3, "lr": 0.03, "averaging": {"kind": "swa", "start": 0.5}}),
    "plateau": Case("mlp", {"epochs": 4, "schedule": "plateau", "plateau_patience": 0, "lr": 0.03}),
    "diverging": Case("mlp", {"epochs": 2, "lr": 100.0, "divergence_retries": 6, "checkpoint_steps": 2}),
    "bf16": Case("convnet", {"steps": 4, "precision": "bf16"}),
}
TOLERANCE = {"bf16": 0.01, "diverging": 1e-2}

Outcomes = dict[str, Outcome]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Outcomes]]:
    """By the number of processes, and by rank."""
    folder = tmp_path_factory.mktemp("trainings")
    return {
        size: together(size, folder / f"{size}", works.trainings, folder / f"scratch-{size}", CASES)
        for size in (1, 2, 3)
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_the_curve_of_losses_is_that_of_one_process(size: int, name: str, outcomes: dict[int, list[Outcomes]]) -> None:
    found, expected = outcomes[size][0][name], outcomes[1][0][name]
    assert len(found.losses) == len(expected.losses)
    tolerance = TOLERANCE.get(name, 1e-5)
    assert found.losses == pytest.approx(expected.losses, abs=tolerance, rel=tolerance)
    # Of 101 samples. A bias before BatchNorm has no gradient but rounding, and Adam makes steps of that: the mean of
    # what validation sees is then a little behind.
    metric = "training_best_validation_metric"
    assert found.details.get(metric) == pytest.approx(expected.details.get(metric), abs=0.015)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_all_processes_end_with_the_same_bits(size: int, name: str, outcomes: dict[int, list[Outcomes]]) -> None:
    first, *others = (one[name].state for one in outcomes[size])
    for other in others:
        assert first.keys() == other.keys()
        assert [key for key in first if not torch.equal(first[key], other[key])] == []


def test_the_comparison_can_fail(outcomes: dict[int, list[Outcomes]]) -> None:
    """Without what is common to all, ranks that see half of each batch come to other losses."""
    one, other = (outcomes[size][0]["adam"].losses for size in (1, 2))
    wrong = outcomes[2][0]["inputs at random"].losses
    assert one == pytest.approx(other, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(one, wrong, strict=False)) > 1e-2


TRAINING = Training(epochs=3, lr=0.01, batch_size=64)
STEPS: dict[str, Step] = {
    "finetune": Finetune(training=TRAINING),
    "gradual pruning": Prune(sparsity=0.6, schedule="cubic", training=TRAINING),
    "regrowth": Prune(sparsity=0.6, regrow=Regrowth(every=2), training=TRAINING),
    "movement": Prune(sparsity=0.6, schedule="cubic", criterion="movement", training=TRAINING),
    "by inputs": Prune(sparsity=0.6, criterion="sparsegpt", training=TRAINING),
    "measured": Prune(sparsity=0.6, scope="auto", training=TRAINING),
    "distill": DistillStep(training=TRAINING.model_copy(update={"distill": Distill()})),
    "distill with projections": DistillStep(
        training=TRAINING.model_copy(
            update={
                "distill": Distill(losses=(SoftTargets(), HiddenStates(projection="linear"))),
                "early_stopping": EarlyStopping(),
            }
        )
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_every_technique_trains_in_two_as_in_one(name: str, tmp_path: Path) -> None:
    step = STEPS[name]
    training = getattr(step, "training")  # noqa: B009 - of every kind of step here
    two = step.model_copy(update={"training": training.model_copy(update={"processes": 2})})
    ((expected, state),) = together(1, tmp_path / "1", works.technique, tmp_path / "one", step)
    (found, ours), _ = together(2, tmp_path / "2", works.technique, tmp_path / "two", two)
    losses = [key for key in expected if key.endswith("_loss")]
    assert len(losses) == 2
    assert [found[key] for key in losses] == pytest.approx([expected[key] for key in losses], abs=1e-4)
    assert (found.pop("training_processes"), found.pop("training_sharded")) == (2, False)
    assert found.keys() == expected.keys()
    assert {key for key in state if (state[key] == 0).any()} == {key for key in ours if (ours[key] == 0).any()}


def test_noise_is_drawn_apart_and_weighed_together(tmp_path: Path) -> None:
    """Each process has noise of its own, so losses differ; but all learn as one how much each weight bears."""
    training = TRAINING.model_copy(update={"processes": 2})
    step = Prune(sparsity=0.6, schedule="cubic", criterion="variational", training=training)
    (found, ours), (_, theirs) = together(2, tmp_path / "2", works.technique, tmp_path / "two", step)
    assert found["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert found["training_last_epoch_loss"] < found["training_first_epoch_loss"]
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
