"""Augmentations that a model's samples do not take are refused before anything is computed, at their field."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.contract.compatibility import check
from app.contract.errors import TersorError
from app.contract.facts import DatasetFacts, ModelFacts, TensorFacts
from app.contract.recipes import resolve
from app.contract.spec import JobSpec
from app.contract.training import Training
from tests.contract.facts import dataset_facts, model_facts, split_facts

ALL = {
    "crop": {},
    "flip": {},
    "jitter": {},
    "erase": {},
    "mixup": {"probability": 0.5},
    "cutmix": {},
}
SPECTROGRAM = {"task": "audio-classification", "accepts": ("audio", "arrays")}


def tensor(*shape: int | None, dtype: str = "float32", name: str = "input") -> TensorFacts:
    return TensorFacts.model_validate({"name": name, "shape": shape, "dtype": dtype})


def facts(*inputs: TensorFacts, **fields: Any) -> ModelFacts:
    return model_facts(inputs=inputs or (tensor(1, 28, 28),), **fields)


def asked(training: dict[str, Any], model: ModelFacts, dataset: DatasetFacts | None = None) -> None:
    steps = [{"technique": "finetune", "training": training}]
    spec = JobSpec.model_validate({"model": "mdl_" + "0" * 26, "dataset": "dst_" + "0" * 26, "steps": steps})
    own = split_facts(inputs=tuple(_closed(one) for one in model.inputs))
    check(resolve(spec), model, dataset or dataset_facts(splits={"train": own}))


def _closed(one: TensorFacts) -> TensorFacts:
    return one.model_copy(update={"shape": tuple(size or 90 for size in one.shape)})


def refused(training: dict[str, Any], model: ModelFacts, dataset: DatasetFacts | None = None) -> str:
    with pytest.raises(TersorError) as caught:
        asked(training, model, dataset)
    assert caught.value.pointer is not None
    return f"{caught.value.code} {caught.value.pointer.removeprefix('/steps/0/training')}: {caught.value.detail}"


def test_pictures_take_what_is_for_pictures() -> None:
    asked({"augmentation": ALL, "label_smoothing": 0.1}, facts())


@pytest.mark.parametrize("name", ["crop", "flip", "jitter", "erase", "cutmix"])
@pytest.mark.parametrize(
    "model",
    [facts(tensor(64)), facts(tensor(28, 28, 3)), facts(tensor(1, 8, 8, dtype="int64"))],
    ids=["rows", "channels last", "whole numbers"],
)
def test_what_is_no_picture_takes_none(name: str, model: ModelFacts) -> None:
    said = refused({"augmentation": {name: {}}}, model)
    assert said.startswith(f"unsupported /augmentation/{name}: {name} is for pictures")


@pytest.mark.parametrize(
    ("training", "model", "said"),
    [
        ({"augmentation": {"crop": {"padding": 28}}}, facts(), "invalid_spec /augmentation/crop/padding: padding"),
        (
            {"augmentation": {"jitter": {"saturation": 0.1}}},
            facts(),
            "invalid_spec /augmentation/jitter/saturation: saturation is for pictures of three channels",
        ),
        (
            {"augmentation": {"spec_augment": {}}},
            facts(),
            "unsupported /augmentation/spec_augment: spec_augment is for the spectrograms",
        ),
        (
            {"augmentation": {"spec_augment": {}}},
            facts(tensor(16000), **SPECTROGRAM),
            "unsupported /augmentation/spec_augment: spec_augment is for spectrograms, whose last two",
        ),
        (
            {"augmentation": {"spec_augment": {}}},
            facts(tensor(64, 64), **SPECTROGRAM),
            "invalid_spec /augmentation/spec_augment/layout: Which dimension",
        ),
        (
            {"augmentation": {"spec_augment": {"frequency_width": 64}}},
            facts(tensor(64, 100), **SPECTROGRAM),
            "invalid_spec /augmentation/spec_augment/frequency_width: frequency_width is to be less than the 64",
        ),
        (
            {"augmentation": {"mixup": {}}},
            facts(tensor(30, dtype="int64"), task="text-classification"),
            "unsupported /augmentation/mixup: mixup mixes what samples hold",
        ),
    ],
)
def test_what_does_not_fit_is_said(training: dict[str, Any], model: ModelFacts, said: str) -> None:
    assert refused(training, model).startswith(said)


def test_regression_has_no_labels_to_smooth_or_mix_and_no_pictures_to_move() -> None:
    model = facts(task="regression", classes=3)
    data = dataset_facts(splits={"train": split_facts(targets="values", target_min=None, target_max=None)})
    assert refused({"label_smoothing": 0.1}, model, data).startswith("unsupported /label_smoothing: ")
    assert refused({"augmentation": {"mixup": {}}}, model, data).startswith("unsupported /augmentation/mixup: ")
    assert "augment the dataset" in refused({"augmentation": {"flip": {}}}, model, data)
    asked({"augmentation": {"erase": {}, "jitter": {}}}, model, data)


def test_spectrograms_of_known_layout_are_masked() -> None:
    options = {"spec_augment": {"frequency_width": 8}, "mixup": {}}
    for shape in ((64, 100), (1, 100, 64), (None, 64), (80, None)):
        asked({"augmentation": options}, facts(tensor(*shape), **SPECTROGRAM))
    square = {"spec_augment": {"frequency_width": 8, "layout": "time_frequency"}}
    asked({"augmentation": square}, facts(tensor(64, 64), **SPECTROGRAM))


def test_labels_that_are_not_there_are_not_smoothed() -> None:
    unlabelled = dataset_facts(splits={"train": split_facts(targets=None, target_min=None, target_max=None)})
    training = {"label_smoothing": 0.1, "distill": {"alpha": 0.5}}
    assert refused(training, facts(), unlabelled).startswith("dataset_mismatch /label_smoothing: ")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"augmentation": {}}, "names nothing"),
        ({"augmentation": {"rotate": {}}}, "rotate"),
        ({"augmentation": {"flip": {"horizontal": 0}}}, "does nothing"),
        ({"augmentation": {"jitter": {"brightness": 0, "contrast": 0}}}, "does nothing"),
        ({"augmentation": {"spec_augment": {"time_masks": 0, "frequency_masks": 0}}}, "does nothing"),
        ({"augmentation": {"erase": {"area": [0.4, 0.2]}}}, r"area is \[least, largest\]"),
        ({"augmentation": {"mixup": {}, "cutmix": {}}}, "add up to 1.5"),
        ({"label_smoothing": 1.0}, "less than 1"),
        ({"label_smoothing": 0.1, "distill": {"alpha": 1}}, "alpha 1"),
        ({"augmentation": {"mixup": {}}, "distill": {"losses": [{"kind": "decoupled"}]}}, "one right class"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Training.model_validate(given)
