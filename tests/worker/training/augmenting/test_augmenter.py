"""What a training with augmentation does to batches, to validation, and to a teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.contract.training import Training
from tests.worker.helpers import context_for, convnet, digits_data, part_of, tiny_model
from worker.context import Context
from worker.data.batch import Batch
from worker.objectives.classification import Classification
from worker.training.augmenting.augmenter import Augmenter
from worker.training.loop import train

SHAPE = (1, 8, 8)
ALL = {
    "crop": {"padding": 1},
    "flip": {},
    "jitter": {},
    "erase": {},
    "mixup": {"probability": 0.5},
    "cutmix": {"probability": 0.5},
}
MODEL = tiny_model(convnet(), shape=SHAPE)


def augmenter(**fields: Any) -> Augmenter:
    return Augmenter(Training.model_validate(fields), MODEL.facts, torch.device("cpu"))


def batch() -> Batch:
    raw = digits_data(SHAPE).splits["train"].read(range(40))
    assert isinstance(raw.inputs, dict)
    assert isinstance(raw.targets, Tensor)
    return Batch((raw.inputs["input"],), raw.targets, indices=tuple(range(40)))


def test_without_augmentation_inputs_stay_and_may_be_remembered() -> None:
    plain = augmenter(label_smoothing=0.1)
    found = plain(batch(), torch.Generator())
    assert plain.fixed
    assert torch.equal(found.inputs[0], batch().inputs[0])
    assert (found.indices, found.smoothing) == (batch().indices, 0.1)
    assert plain.details() == {"training_label_smoothing": 0.1}


def test_with_augmentation_no_sample_is_the_same_twice() -> None:
    changing = augmenter(augmentation=ALL)
    random = torch.Generator().manual_seed(1)
    one, other = changing(batch(), random), changing(batch(), random)
    assert not changing.fixed
    assert one.indices is None
    assert not torch.equal(one.inputs[0], other.inputs[0])
    again = changing(batch(), torch.Generator().manual_seed(1))
    assert torch.equal(one.inputs[0], again.inputs[0])
    assert one.targets is not None
    assert again.targets is not None
    assert torch.equal(one.targets, again.targets)
    assert changing.details()["training_augmentation"] == "crop, flip, jitter, erase, mixup, cutmix"


class Watched(Classification):
    """Notes what is learned from and what is judged."""

    def __init__(self) -> None:
        self.learned: list[Tensor] = []
        self.judged: list[Tensor] = []

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        self.learned.append(batch.inputs[0])
        return super().loss(outputs, batch)

    def judge(self, tally: Any, forward: Any, batch: Batch) -> None:
        self.judged.append(batch.inputs[0])
        super().judge(tally, forward, batch)


def context(scratch: Path, task: Watched) -> Context:
    data = part_of(digits_data(SHAPE), {"train": 120, "validation": 50})
    return context_for(replace(tiny_model(convnet(), shape=SHAPE), task=task), data, scratch)


def test_validation_sees_the_samples_as_they_are(tmp_path: Path) -> None:
    task = Watched()
    training = {"epochs": 1, "batch_size": 30, "early_stopping": {}, "augmentation": ALL}
    train(context(tmp_path, task), Training.model_validate(training))
    data = part_of(digits_data(SHAPE), {"train": 120, "validation": 50})
    validation = data.splits["validation"].read(range(50)).inputs
    assert isinstance(validation, dict)
    assert torch.equal(torch.cat(task.judged), validation["input"])
    trained = data.splits["train"].read(range(120)).inputs
    assert isinstance(trained, dict)
    known = {sample.numpy().tobytes() for sample in trained["input"]}
    assert not any(sample.numpy().tobytes() in known for sample in torch.cat(task.learned))


@pytest.mark.parametrize(
    ("asked", "kept"), [({}, True), ({"augmentation": ALL}, False)], ids=["as they are", "changed"]
)
def test_a_teacher_is_asked_anew_where_samples_change(asked: dict[str, Any], kept: bool, tmp_path: Path) -> None:
    training = {"epochs": 3, "batch_size": 30, "distill": {}} | asked
    details = train(context(tmp_path, Watched()), Training.model_validate(training)).details()
    assert ("teacher_answers_kept" in details) is kept
    assert kept or "change at random" in str(details["teacher_answers"])
