"""What the training object takes, what it refuses, and what it fills in."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.contract.scheduling import READ_BY
from app.contract.training import Training


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({}, "lr", 1e-3),
        ({"optimizer": "adadelta"}, "lr", 1.0),
        ({"optimizer": "adadelta", "lr": 0.5}, "lr", 0.5),
        ({"optimizer": "adafactor"}, "lr", 0.01),
        ({"schedule": "step"}, "gamma", 0.1),
        ({"schedule": "exponential"}, "gamma", 0.95),
        ({"schedule": "exponential", "gamma": 0.1}, "gamma", 0.1),
        ({}, "epochs", 1),
        ({"steps": 3}, "epochs", None),
    ],
)
def test_defaults_follow_the_choice(given: dict[str, Any], field: str, value: float | None) -> None:
    training = Training.model_validate(given)
    assert getattr(training, field) == value
    assert Training.model_validate(training.model_dump(mode="json")) == training  # as a store keeps it


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epochs": 1, "steps": 1}, "epochs or steps"),
        ({"optimizer": ["adam"]}, "Input should be 'sgd'"),
        ({"schedule": {"kind": "step"}}, "Input should be 'constant'"),
        ({"momentum": 0.5}, "momentum is for sgd and rmsprop; the optimizer is adam"),
        ({"optimizer": "rmsprop", "nesterov": True}, "nesterov is for sgd"),
        ({"optimizer": "sgd", "nesterov": True, "momentum": 0}, "momentum above 0"),
        ({"optimizer": "sgd", "betas": [0.8, 0.9]}, "betas is for adam"),
        ({"optimizer": "adam", "betas": [0.8, 1.0]}, "less than 1"),
        ({"schedule": "multi_step"}, "needs milestones"),
        ({"milestones": [3]}, "milestones is for schedule multi_step"),
        ({"schedule": "multi_step", "milestones": [3, 2]}, "must grow; they are 3, 2"),
        ({"power": 3}, "power is for schedule polynomial; it is constant"),
        ({"schedule": "one_cycle", "warmup_share": 0.1}, "warm-up of its own"),
        ({"warmup_steps": 3, "warmup_share": 0.1}, "not both"),
        ({"steps": 10, "warmup_steps": 10}, "fewer than the 10 steps"),
        ({"batch_size": 8, "micro_batch_size": 9}, "batch_size, which is 8"),
        ({"averaging": {"kind": "swa"}, "early_stopping": {}}, "give one"),
        ({"averaging": {"kind": "ema", "start": 0.5}}, "start"),
        ({"precision": "float16"}, "fp16"),
        ({"layer_decay": 0}, "greater than 0"),
        ({"sharded": True}, "give processes, 2 or more"),
        ({"sharded": True, "processes": 2, "optimizer": "adafactor"}, "another optimizer"),
        ({"processes": 8, "batch_size": 7}, "batch_size of 8 or more"),
        ({"processes": 4, "hosts": 2, "batch_size": 7}, "batch_size of 8 or more"),
        ({"hosts": 17}, "less than or equal to 16"),
        ({"clip_norm": 0}, "greater than 0"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Training.model_validate(given)


def test_every_field_of_a_schedule_is_one_of_the_training() -> None:
    assert set(READ_BY) <= set(Training.model_fields)


@pytest.mark.parametrize(
    ("given", "judges"), [({}, False), ({"early_stopping": {}}, True), ({"schedule": "plateau"}, True)]
)
def test_who_needs_a_validation_split(given: dict[str, Any], judges: bool) -> None:
    assert Training.model_validate(given).judges is judges
