"""What a training for integers is when a part of it is given, and fields that its bits do not read."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.contract.distillation import Distill
from app.contract.qat import Qat
from app.contract.training import Training


def training(**fields: Any) -> Training:
    return Qat.model_validate({"training": fields}).training


def test_what_a_client_leaves_out_of_a_training_is_as_it_is_without_one() -> None:
    whole = Qat().training
    assert (whole.epochs, whole.lr, whole.schedule, whole.distill) == (3, 1e-4, "cosine", Distill())
    assert training(epochs=5) == whole.model_copy(update={"epochs": 5})
    assert training(lr=1e-3, batch_size=32) == whole.model_copy(update={"lr": 1e-3, "batch_size": 32})
    assert training() == whole
    assert training(distill={"alpha": 1.0}).distill == Distill(alpha=1.0)


def test_without_a_teacher_where_that_is_said() -> None:
    assert training(distill=None).distill is None
    assert training(distill=None).schedule == "cosine"


def test_defaults_that_do_not_go_with_what_is_given_stay_out() -> None:
    assert (training(steps=20).steps, training(steps=20).epochs) == (20, None)
    assert training(optimizer="adadelta").lr == 1.0
    assert training(optimizer="sgd").lr == 1e-4
    assert training(schedule="constant").schedule == "constant"


def test_a_step_is_the_same_when_it_is_read_again() -> None:
    for given in ({"steps": 7, "distill": None}, {"epochs": 2}, {"optimizer": "adafactor"}):
        step = Qat.model_validate({"training": given, "calibration": {"samples": 9}})
        assert Qat.model_validate(step.model_dump(mode="json")) == step
        assert Qat.model_validate_json(step.model_dump_json()) == step


def test_calibration_is_by_mse_unless_a_method_is_named() -> None:
    calibration = Qat.model_validate({"calibration": {"samples": 512}}).calibration
    assert (calibration.method, calibration.samples) == ("mse", 512)
    assert Qat.model_validate({"calibration": {"method": "entropy"}}).calibration.method == "entropy"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"calibration": {"method": "auto"}}, "name minmax, percentile, entropy or mse"),
        ({"bits": 4, "activations": "int8"}, "activations is for 8 bits"),
        ({"bits": 3, "calibration": {"samples": 64}}, "calibration is for 8 bits"),
        ({"bits": 8, "group_size": 32}, "group_size is for fewer than 8 bits"),
        ({"group_size": 48}, "power of two"),
        ({"training": {"optimizer": ["adam"]}}, "Input should be"),
        ({"training": [1]}, "Input should be"),
        ({"calibration": 3}, "Input should be"),
    ],
)
def test_what_nothing_reads_or_makes_no_sense_is_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Qat.model_validate(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 8, "group_size": None, "symmetric": True},  # which is what 8 bits have
        {"bits": 8, "group_size": 128},
        {"bits": 4, "group_size": 32, "calibration": {"method": "mse"}, "activations": "auto"},
    ],
)
def test_what_is_so_in_any_case_may_be_said(fields: dict[str, Any]) -> None:
    assert Qat.model_validate(fields).bits == fields["bits"]
