"""The resize step with method connections: what it says, where it may stand, and what is written of it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from app.contract.compatibility import check
from app.contract.errors import DatasetMismatch, InvalidSpec, OrderRefused, TersorError, Unsupported
from app.contract.estimate import TRIED, WAYS, estimate
from app.contract.facts import DatasetFacts
from app.contract.native import planned
from app.contract.resizing import Resize
from app.contract.rewiring import Rewire
from app.contract.spec import Step
from tests.contract.facts import COST, dataset_facts
from tests.contract.test_resizing import model, spec

REWIRE = {"technique": "resize", "method": "connections", "connections": 2}
STUDENT = {"technique": "distill", "student": {"kind": "auto"}}
FOR_A_CONFIG = ["packed", "compressed-tensors"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of connections and budget"),
        ({"connections": 1, "budget": {"macs": 0.5}}, "exactly one of connections and budget"),
        ({"connections": 0}, "greater than or equal to 1"),
        ({"connections": 1, "what": "layers"}, "branches"),
        ({"connections": 1, "layers": 1}, "Extra inputs"),
        ({"what": "skips", "budget": {"parameters": 0.5}}, "skips have no weights"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Rewire(**fields)


def test_a_step_is_told_by_its_technique_and_method() -> None:
    kinds = TypeAdapter[Step](Step)
    assert isinstance(kinds.validate_python(REWIRE), Rewire)
    assert isinstance(kinds.validate_python({"technique": "resize", "layers": 1}), Resize)
    assert kinds.validate_json(kinds.dump_json(Rewire(connections=1))) == Rewire(connections=1)
    with pytest.raises(ValidationError, match=r"method is one of drop_layers, .*connections"):
        kinds.validate_python(REWIRE | {"method": "widen"})


@pytest.mark.parametrize(
    ("steps", "export", "data", "kind", "pointer"),
    [
        ([REWIRE | {"exclude": ["model.layers.9"]}], ["native"], ("train",), InvalidSpec, "/steps/0/exclude/0"),
        ([REWIRE], ["native"], (), DatasetMismatch, "/dataset"),
        ([REWIRE | {"criterion": "taylor"}], ["native"], ("calibration",), DatasetMismatch, "/steps/0"),
        ([{"technique": "prune", "sparsity": 0.5}, REWIRE], ["native"], ("train",), OrderRefused, "/steps/1"),
        ([REWIRE, STUDENT], ["native"], ("train",), OrderRefused, "/steps/1"),
        ([{"technique": "quantize"}, REWIRE], ["onnx"], ("train",), OrderRefused, "/steps/1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_at_its_place(
    steps: list[dict[str, Any]], export: list[str], data: tuple[str, ...], kind: type[TersorError], pointer: str
) -> None:
    facts: DatasetFacts | None = dataset_facts(*data) if data else None
    with pytest.raises(kind) as caught:
        check(spec(*steps, export=export), model(), facts)
    assert caught.value.pointer == pointer


def test_a_config_has_no_words_for_it() -> None:
    folder = model(format="huggingface")
    assert planned(spec(REWIRE, export=["native", "onnx"]), folder) == ("pt2", "onnx")
    assert planned(spec(REWIRE, export=["native"]), model()) == ("native",)
    for name in FOR_A_CONFIG:
        with pytest.raises(Unsupported) as caught:
            check(spec(REWIRE, export=[name]), folder, dataset_facts("train"))
        assert caught.value.pointer == "/export"


def test_a_model_that_cannot_be_trained_is_not_taken_apart() -> None:
    fixed = model(trainable=False, untrainable_reason="It is so.")
    with pytest.raises(Unsupported) as caught:
        check(spec(REWIRE, export=["native"]), fixed, dataset_facts("train"))
    assert caught.value.pointer == "/steps/0"


def test_every_way_is_tried_and_the_greedy_way_looks_at_those_that_are_left() -> None:
    own, data = model(cost=COST), dataset_facts("train", "calibration")

    def seconds(**fields: Any) -> float:
        return estimate(spec(REWIRE | fields, export=["native"]), own, data).seconds

    blocks = {"technique": "resize", "layers": 2}
    tried = seconds() - estimate(spec(blocks, export=["native"]), own, data).seconds
    assert tried == pytest.approx(TRIED * WAYS * 8 * COST.seconds)  # of eight blocks
    greedy = [seconds(criterion="greedy", connections=count) - seconds() for count in (1, 2)]
    assert greedy[1] / greedy[0] == pytest.approx((16 + 15) / 16)
