"""The resize step with method width: what it says, where it may stand, and what is written of it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from app.contract.compatibility import check
from app.contract.errors import DatasetMismatch, InvalidSpec, OrderRefused, TersorError, Unsupported
from app.contract.estimate import estimate
from app.contract.facts import DatasetFacts
from app.contract.native import planned
from app.contract.recipes import resolve
from app.contract.resizing import Resize
from app.contract.spec import JobSpec, ResolvedSpec, Step
from app.contract.widths import ResizeWidth
from tests.contract.facts import COST, dataset_facts, model_facts

MODEL = "mdl_" + "0" * 26
WIDTH = {"technique": "resize", "method": "width", "multiplier": 0.5}
SEARCHED = {"technique": "resize", "method": "width", "budget": {"macs": 0.5}, "search": "evolutionary"}


def spec(*steps: dict[str, Any], **fields: Any) -> ResolvedSpec:
    return resolve(JobSpec.model_validate({"model": MODEL, "steps": steps} | fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of multiplier and budget"),
        ({"multiplier": 0.5, "budget": {"macs": 0.5}}, "exactly one of multiplier and budget"),
        ({"multiplier": 1.0}, "less than 1"),
        ({"multiplier": 0.0}, "greater than 0"),
        ({"multiplier": 0.05}, r"0\.05 is below keep_at_least, 0\.1: give a smaller one"),
        ({"multiplier": 0.5, "search": "evolutionary"}, "give budget instead of multiplier"),
        ({"budget": {"macs": 0.5}, "candidates": 1}, "greater than or equal to 2"),
        ({"budget": {"macs": 0.5, "latency": 0.5}}, "not macs and latency"),
        ({"multiplier": 0.5, "layers": 2}, "Extra inputs"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ResizeWidth(**fields)


def test_a_step_is_told_by_its_method() -> None:
    steps = spec(WIDTH, {"technique": "resize", "layers": 1}, SEARCHED).steps
    assert [type(step) for step in steps] == [ResizeWidth, Resize, ResizeWidth]
    again: Any = TypeAdapter(tuple[Step, ...]).validate_json(TypeAdapter(tuple[Step, ...]).dump_json(steps))
    assert again == steps


def test_a_method_that_there_is_not_is_told_of_those_that_there_are() -> None:
    with pytest.raises(ValidationError, match="method is one of drop_layers, width, connections"):
        spec(WIDTH | {"method": "widths"})


@pytest.mark.parametrize(
    ("steps", "data", "kind", "pointer"),
    [
        ([WIDTH | {"exclude": ["9"]}], None, InvalidSpec, "/steps/0/exclude/0"),
        ([SEARCHED], None, DatasetMismatch, "/dataset"),
        ([WIDTH | {"criterion": "activations"}], None, DatasetMismatch, "/dataset"),
        ([WIDTH | {"criterion": "taylor"}], dataset_facts("calibration"), DatasetMismatch, "/steps/0"),
        ([WIDTH | {"training": {}}], dataset_facts("calibration"), DatasetMismatch, "/steps/0"),
        ([{"technique": "prune", "sparsity": 0.5}, WIDTH], None, OrderRefused, "/steps/1"),
        ([{"technique": "quantize", "method": "dynamic"}, WIDTH], None, OrderRefused, "/steps/1"),
        ([WIDTH, {"technique": "distill", "student": {"kind": "auto"}}], None, OrderRefused, "/steps/1"),
    ],
)
def test_what_does_not_fit_is_refused_at_its_place(
    steps: list[dict[str, Any]], data: DatasetFacts | None, kind: type[TersorError], pointer: str
) -> None:
    with pytest.raises(kind) as caught:
        check(spec(*steps, export=["native", "onnx"]), model_facts(), data)
    assert caught.value.pointer == pointer


def test_without_data_one_multiplier_is_taken_and_a_search_needs_samples() -> None:
    check(spec(WIDTH), model_facts(), None)
    check(spec(SEARCHED), model_facts(), dataset_facts("calibration"))


def test_a_config_has_words_for_layers_that_stay_alike() -> None:
    folder = model_facts().model_copy(update={"format": "huggingface"})
    for step in (WIDTH, SEARCHED):
        check(spec(step, export=["native", "packed"]), folder, dataset_facts("train"))
        assert planned(spec(step), folder) == ("native", "onnx")


def test_a_model_that_cannot_be_trained_is_not_taken_apart() -> None:
    fixed = model_facts().model_copy(update={"trainable": False, "untrainable_reason": "It is so."})
    with pytest.raises(Unsupported) as caught:
        check(spec(WIDTH, export=["native"]), fixed, None)
    assert caught.value.pointer == "/steps/0"


def test_a_search_takes_two_passes_of_the_samples_for_each_candidate() -> None:
    facts, data = model_facts().model_copy(update={"cost": COST}), dataset_facts("train", "calibration")

    def seconds(step: dict[str, Any]) -> float:
        return estimate(spec(step, export=["native"]), facts, data).seconds

    uniform = seconds(SEARCHED | {"search": "uniform"})
    few, many = (seconds(SEARCHED | {"candidates": count}) - uniform for count in (10, 30))
    assert few > 0
    assert many / few == pytest.approx(3)
    assert seconds(WIDTH | {"criterion": "taylor"}) > seconds(WIDTH)
