"""Structured pruning: what the step says, where it may stand, and what is written in its place."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.contract.compatibility import check
from app.contract.errors import DatasetMismatch, InvalidSpec, OrderRefused, TersorError, Unsupported
from app.contract.estimate import estimate
from app.contract.native import planned
from app.contract.pruning import Prune
from app.contract.spec import trainings_of
from app.contract.structured import StructuredPrune
from app.contract.widths import ResizeWidth
from tests.contract.facts import COST, dataset_facts
from tests.contract.test_factorizing import model, spec

STRUCTURED = {"technique": "prune", "granularity": "structured", "budget": {"macs": 0.5}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of budget and sparsity"),
        ({"budget": {"macs": 0.5}, "sparsity": 0.5}, "exactly one of budget and sparsity"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": 0.5, "rounds": 2}, "give training"),
        ({"sparsity": 0.5, "criterion": "magnitude"}, "fpgm"),
        ({"sparsity": 0.5, "schedule": "cubic"}, "schedule"),
        ({"sparsity": 0.5, "lasso": {"training": {"lr": "auto"}}}, "lasso trains as it is told"),
        ({"sparsity": 0.5, "lasso": {"training": {"processes": 2}}, "training": {}}, "same hosts and processes"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        StructuredPrune(**fields)


def test_the_granularity_tells_the_two_steps_apart() -> None:
    steps = spec(STRUCTURED, {"technique": "prune", "sparsity": 0.5, "granularity": "2:4"} | {"sparsity": None}).steps
    assert [type(step) for step in steps] == [StructuredPrune, Prune]


@pytest.mark.parametrize(
    ("steps", "data", "kind", "pointer"),
    [
        ([STRUCTURED | {"exclude": ["9"]}], None, InvalidSpec, "/steps/0/exclude/0"),
        ([STRUCTURED | {"criterion": "activations"}], None, DatasetMismatch, "/dataset"),
        ([STRUCTURED | {"scope": "auto"}], None, DatasetMismatch, "/dataset"),
        ([STRUCTURED | {"criterion": "taylor"}], dataset_facts("calibration"), DatasetMismatch, "/steps/0"),
        ([STRUCTURED | {"training": {}}], dataset_facts("calibration"), DatasetMismatch, "/steps/0"),
        ([STRUCTURED | {"lasso": {}}], dataset_facts("calibration"), DatasetMismatch, "/steps/0/lasso/training"),
        ([{"technique": "prune", "sparsity": 0.5}, STRUCTURED], None, OrderRefused, "/steps/1"),
        ([{"technique": "quantize", "method": "dynamic"}, STRUCTURED], None, OrderRefused, "/steps/1"),
        ([STRUCTURED, {"technique": "distill", "student": {"kind": "auto"}}], None, OrderRefused, "/steps/1"),
        (
            [{"technique": "fuse", "for_inference": True}, STRUCTURED | {"lasso": {}}],
            dataset_facts("train"),
            OrderRefused,
            "/steps/1",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_its_place(
    steps: list[dict[str, Any]], data: Any, kind: type[TersorError], pointer: str
) -> None:
    with pytest.raises(kind) as refused:
        check(spec(*steps, export=["onnx"]), model(), data)
    assert refused.value.pointer == pointer


def test_a_model_that_only_runs_keeps_its_units() -> None:
    facts = model(trainable=False, untrainable_reason="It has a loop.")
    with pytest.raises(Unsupported, match="It has a loop"):
        check(spec(STRUCTURED), facts, None)


def test_a_config_may_have_words_for_layers_that_lose_the_same() -> None:
    folder = model(format="huggingface")
    assert planned(spec(STRUCTURED), folder) == ("pt2", "onnx")
    assert planned(spec(STRUCTURED | {"scope": "local"}), folder) == ("native", "onnx")
    with pytest.raises(Unsupported, match="no words for layers of sizes or connections of their own"):
        check(spec(STRUCTURED, export=["packed"]), folder, None)
    check(spec(STRUCTURED | {"scope": "local"}, export=["packed"]), folder, None)


def test_estimates_count_what_is_looked_at_and_trained() -> None:
    facts, data = model(cost=COST), dataset_facts("train", "test")
    once = {"training": {"epochs": 1}}
    steps = [
        STRUCTURED,
        STRUCTURED | {"criterion": "taylor"},
        STRUCTURED | {"criterion": "taylor"} | once,
        STRUCTURED | {"criterion": "taylor", "rounds": 3} | once,
        STRUCTURED | {"criterion": "taylor", "rounds": 3, "lasso": {"training": {"epochs": 5}}} | once,
    ]
    seconds = [estimate(spec(step), facts, data).seconds for step in steps]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == len(seconds)


@pytest.mark.parametrize("step", [STRUCTURED, {"technique": "resize", "method": "width", "multiplier": 0.5}])
def test_layers_are_fitted_where_no_training_follows_and_that_takes_its_time(step: dict[str, Any]) -> None:
    facts, data = model(cost=COST), dataset_facts("train", "test")
    once = {"training": {"epochs": 1}}

    def made(**fields: Any) -> tuple[bool, float]:
        own = spec(step | fields)
        assert isinstance(own.steps[0], StructuredPrune | ResizeWidth)
        return own.steps[0].reconstructs, estimate(own, facts, data).seconds

    told = [made(), made(reconstruct=False), made(reconstruct=True, **once), made(**once)]
    assert [fitted for fitted, _ in told] == [True, False, True, False]
    assert told[0][1] > told[1][1]
    assert told[2][1] > told[3][1]


def test_a_training_in_a_later_step_counts_and_what_is_asked_for_needs_samples() -> None:
    later = spec(STRUCTURED, {"technique": "finetune", "training": {"epochs": 1}})
    asked = spec(STRUCTURED | {"reconstruct": True}, {"technique": "finetune", "training": {"epochs": 1}})
    told = [own.steps[0].reconstructs for own in (later, asked) if isinstance(own.steps[0], StructuredPrune)]
    assert told == [False, True]
    check(spec(STRUCTURED), model(), None)
    with pytest.raises(DatasetMismatch, match="reconstruct needs a `calibration`"):
        check(spec(STRUCTURED | {"reconstruct": True}), model(), None)


def test_a_training_in_front_counts_as_any_other() -> None:
    teacher = "mdl_" + 26 * "0"
    training = {"epochs": 1, "hosts": 2, "distill": {"teacher": teacher}}
    width = {"technique": "resize", "method": "width", "multiplier": 0.5}
    own = spec(width, STRUCTURED | {"lasso": {"training": training}})
    assert own.named_models() == {teacher: "/steps/1/lasso/training/distill/teacher"}
    assert own.hosts == 2
    assert own.training_pointer("hosts") == "/steps/1/lasso/training/hosts"
    assert isinstance(own.steps[0], ResizeWidth)
    assert not own.steps[0].reconstructs
    assert list(trainings_of(own.steps[1])) == ["lasso/training"]
    both = spec(STRUCTURED | {"lasso": {}, "training": {}}).steps[0]
    assert list(trainings_of(both)) == ["lasso/training", "training"]
