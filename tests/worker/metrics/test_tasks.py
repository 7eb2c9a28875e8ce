"""Every metric of every task against scikit-learn or a formula, in batches of any size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
from torch import Tensor
from torch.nn import functional

from app.contract.errors import DatasetMismatch
from app.contract.tasks import HIGHER_IS_BETTER, TASKS
from worker.data.batch import IGNORED, Batch
from worker.metrics.tally import Scores
from worker.objectives.base import Task, scores
from worker.objectives.classification import Classification
from worker.objectives.embedding import SentenceEmbedding
from worker.objectives.language import CausalLm, MaskedLm
from worker.objectives.tokens import TokenClassification
from worker.objectives.values import MultiLabel, Regression

SAMPLES = 157
on_any_batches = pytest.mark.parametrize("size", [1, 40, SAMPLES])


def judged(task: Task, outputs: Tensor, targets: Tensor, size: int) -> Scores:
    places = torch.arange(len(outputs)).split(size)
    batches = [Batch((outputs[own],), targets[own], indices=tuple(own.tolist())) for own in places]
    return scores(task, lambda inputs: inputs[0], batches)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classes(count: int, *shape: int) -> Tensor:
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(1))


@on_any_batches
def test_classification(size: int) -> None:
    targets = classes(7, SAMPLES)
    logits = drawn(SAMPLES, 7) + 2 * functional.one_hot(targets, 7)
    found = judged(Classification(), logits, targets, size)
    said, likely = logits.argmax(1).numpy(), logits.double().softmax(1).numpy()
    truth, every = targets.numpy(), list(range(7))
    assert (found.value, found.samples) == (reference.accuracy_score(truth, said), SAMPLES)
    assert found.others == pytest.approx(
        {
            "balanced_accuracy": reference.balanced_accuracy_score(truth, said),
            "macro_f1": reference.f1_score(truth, said, average="macro"),
            "log_loss": reference.log_loss(truth, likely, labels=every),
            "calibration_error": calibration_error(likely, truth, 15),
            "top_5_accuracy": reference.top_k_accuracy_score(truth, likely, k=5, labels=every),
        },
        abs=1e-6,
    )


def calibration_error(likely: np.ndarray, truth: np.ndarray, bins: int) -> float:
    """Expected calibration error (Guo et al. 2017), bin by bin."""
    confidence, right = likely.max(1), likely.argmax(1) == truth
    total = 0.0
    for low, high in zip(np.linspace(0, 1, bins + 1)[:-1], np.linspace(0, 1, bins + 1)[1:], strict=True):
        own = (confidence > low) & (confidence <= high)
        if own.any():
            total += own.mean() * abs(right[own].mean() - confidence[own].mean())
    return total


def test_a_class_that_does_not_occur_takes_no_part_in_balanced_accuracy() -> None:
    targets = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    said = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 2])  # once a class that is in no sample
    found = judged(Classification(), functional.one_hot(said, 4).float(), targets, 4).others
    assert found["balanced_accuracy"] == pytest.approx(0.9)
    assert found["macro_f1"] == pytest.approx(reference.f1_score(targets, said, average="macro"))


def test_classes_that_are_all_alike_are_not_all_among_five() -> None:
    found = judged(Classification(), torch.zeros(20, 20), torch.arange(20), 8)
    assert found.others["top_5_accuracy"] == 0.25


def test_a_hundred_thousand_classes_need_no_matrix_of_them() -> None:
    """It would have 80 GB."""
    targets = torch.tensor([0, 99_999, 7])
    found = judged(Classification(), functional.one_hot(targets, 100_000).float(), targets, 2)
    assert (found.value, found.others["macro_f1"], found.others["balanced_accuracy"]) == (1.0, 1.0, 1.0)


def test_few_classes_have_no_five_likeliest_and_one_class_is_always_right() -> None:
    assert "top_5_accuracy" not in judged(Classification(), drawn(9, 5), classes(5, 9), 4).others
    assert judged(Classification(), drawn(9, 1), torch.zeros(9, dtype=torch.int64), 4).value == 1.0


def test_what_is_not_a_number_is_wrong_and_leaves_no_loss() -> None:
    logits, targets = drawn(20, 7), classes(7, 20)
    logits[3, 2] = math.nan
    logits[3, int(targets[3])] = 100.0
    found = judged(Classification(), logits, targets, 8)
    right = (logits.nan_to_num(-1e9).argmax(1) == targets).float()
    right[3] = 0
    assert found.value == pytest.approx(float(right.mean()))
    assert "log_loss" not in found.others
    assert 0 <= found.others["macro_f1"] < 1


@on_any_batches
def test_tags(size: int) -> None:
    targets = classes(4, SAMPLES, 6)
    logits = drawn(SAMPLES, 6, 4) + functional.one_hot(targets, 4)
    targets[:, 4:] = IGNORED
    found = judged(TokenClassification(), logits, targets, size)
    truth, said = targets[:, :4].flatten(), logits[:, :4].flatten(0, 1)
    assert found.value == reference.accuracy_score(truth, said.argmax(1))
    assert found.others == pytest.approx(
        {
            "macro_f1": reference.f1_score(truth, said.argmax(1), average="macro"),
            "log_loss": float(functional.cross_entropy(said.double(), truth)),
        },
        abs=1e-6,
    )


@on_any_batches
def test_language_models(size: int) -> None:
    ids = classes(11, SAMPLES, 5)
    logits = drawn(SAMPLES, 5, 11)
    outputs = logits.clone()
    batches = [
        Batch((outputs[own],), ids[own], indices=tuple(own.tolist())) for own in torch.arange(SAMPLES).split(size)
    ]
    found = scores(CausalLm(), lambda inputs: inputs[0], batches)
    loss = float(functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()))
    right = float((logits[:, :-1].argmax(-1) == ids[:, 1:]).double().mean())
    assert found.value == pytest.approx(math.exp(loss), rel=1e-6)
    assert found.others == pytest.approx({"log_loss": loss, "token_accuracy": right}, rel=1e-6)


def test_hidden_tokens_are_those_of_the_batch_wherever_it_is_judged() -> None:
    """So processes that take turns judge what one would."""
    ids = classes(50, 16, 30)
    table = drawn(50, 50)
    task = MaskedLm(mask=49, special=[48], vocabulary=50)
    batches = [Batch((ids[own],), ids[own], indices=tuple(own.tolist())) for own in torch.arange(16).split(4)]

    def log_loss(chosen: list[Batch]) -> float:
        return scores(task, lambda inputs: table[inputs[0]], chosen).others["log_loss"]

    assert log_loss(batches) == log_loss(batches[::-1])
    assert log_loss(batches[:1]) != log_loss(batches[1:2])


@on_any_batches
def test_values(size: int) -> None:
    targets = 100 + drawn(SAMPLES, 3)
    outputs = targets + 0.3 * drawn(SAMPLES, 3, seed=2)
    found = judged(Regression(), outputs, targets, size)
    truth, said = targets.double().flatten().numpy(), outputs.double().flatten().numpy()
    assert found.value == pytest.approx(reference.mean_squared_error(truth, said), rel=1e-9)
    assert found.others == pytest.approx(
        {
            "root_mean_squared_error": reference.root_mean_squared_error(truth, said),
            "mean_absolute_error": reference.mean_absolute_error(truth, said),
            "r2": reference.r2_score(truth, said),
        },
        rel=1e-6,
    )


@on_any_batches
def test_values_far_from_zero_keep_their_variance(size: int) -> None:
    targets = (1e9 + drawn(SAMPLES, 1)).double() + drawn(SAMPLES, 1, seed=4).double()
    outputs = targets + 0.1 * drawn(SAMPLES, 1, seed=2)
    expected = 1 - float((targets - outputs).square().sum() / (targets - targets.mean()).square().sum())
    assert judged(Regression(), outputs, targets, size).others["r2"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("targets", [torch.tensor([[2.0]]), torch.full((5, 1), 2.0)], ids=["one", "equal ones"])
def test_the_variance_of_one_value_is_not_predicted(targets: Tensor) -> None:
    found = judged(Regression(), targets + 1, targets, 2)
    assert found.value == 1.0
    assert set(found.others) == {"root_mean_squared_error", "mean_absolute_error"}


@on_any_batches
def test_labels(size: int) -> None:
    targets = (drawn(SAMPLES, 4, seed=3) > 0.3).float()
    logits = drawn(SAMPLES, 4) + targets
    found = judged(MultiLabel(), logits, targets, size)
    said = (logits > 0).numpy()
    assert found.value == pytest.approx(reference.f1_score(targets, said, average="micro"), abs=1e-6)
    assert found.others == pytest.approx(
        {
            "mean_average_precision": reference.average_precision_score(targets, logits, average="macro"),
            "macro_f1": reference.f1_score(targets, said, average="macro"),
            "exact_match": reference.accuracy_score(targets, said),
        },
        abs=1e-6,
    )


@on_any_batches
def test_rare_labels_have_their_own_curve(size: int) -> None:
    """Their likelihoods lie close together: a curve at given thresholds would not see one from another."""
    targets = functional.one_hot(torch.arange(SAMPLES) % 50, 50).float()
    logits = 0.1 * drawn(SAMPLES, 50) + 0.2 * targets - 6
    found = judged(MultiLabel(), logits, targets, size).others["mean_average_precision"]
    assert found == pytest.approx(reference.average_precision_score(targets, logits, average="macro"), abs=1e-6)


def test_embeddings() -> None:
    found = judged(SentenceEmbedding(), drawn(SAMPLES, 8), classes(3, SAMPLES), 40)
    assert (found.samples, found.others) == (SAMPLES, {})
    assert 0 < found.value < 1


NOTHING: dict[str, Callable[[], Any]] = {
    "tags": lambda: judged(TokenClassification(), drawn(4, 3, 2), torch.full((4, 3), IGNORED), 2),
    "texts of one token": lambda: judged(CausalLm(), drawn(4, 1, 5), classes(5, 4, 1), 2),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_counts_there_is_no_metric(name: str) -> None:
    with pytest.raises(DatasetMismatch, match="Nothing in the split counts"):
        NOTHING[name]()


def test_every_metric_has_a_direction() -> None:
    named = {kind.metric for kind in TASKS.values()}
    tasks: list[tuple[Task, int]] = [
        *((task, 9) for task in (Classification(), TokenClassification(), CausalLm(), MultiLabel(), Regression())),
    ]
    for task, width in tasks:
        tally = task.tally()
        named |= set(tally._make(width))
    assert named - {"word_error_rate"} <= set(HIGHER_IS_BETTER)
