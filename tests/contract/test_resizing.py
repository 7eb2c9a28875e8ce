"""The resize step: what it says, where it may stand, and what is written of it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.contract.compatibility import check
from app.contract.errors import DatasetMismatch, InvalidSpec, OrderRefused, TersorError, Unsupported
from app.contract.estimate import estimate
from app.contract.facts import DatasetFacts, LayerFacts, ModelFacts
from app.contract.native import planned
from app.contract.recipes import resolve
from app.contract.resizing import Resize
from app.contract.spec import JobSpec, ResolvedSpec
from tests.contract.facts import COST, dataset_facts, model_facts

MODEL = "mdl_" + "0" * 26
RESIZE = {"technique": "resize", "method": "drop_layers", "layers": 2}
LAYERS = tuple(
    LayerFacts(name=f"model.layers.{place}.{part}", type="Linear", shape=(8, 8), parameters=64)
    for place in range(8)
    for part in ("up", "down")
)


def spec(*steps: dict[str, Any], **fields: Any) -> ResolvedSpec:
    return resolve(JobSpec.model_validate({"model": MODEL, "steps": steps} | fields))


def model(**changes: Any) -> ModelFacts:
    return model_facts().model_copy(update={"layers": LAYERS, **changes})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of layers and budget"),
        ({"layers": 1, "budget": {"macs": 0.5}}, "exactly one of layers and budget"),
        ({"layers": 0}, "greater than or equal to 1"),
        ({"budget": {"macs": 0.5, "bytes": 0.5}}, "not macs and bytes"),
        ({"layers": 1, "method": "widen"}, "drop_layers"),
        ({"layers": 1, "criterion": "magnitude"}, "greedy"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Resize(**fields)


def test_a_step_is_told_by_its_technique() -> None:
    (step,) = spec(RESIZE).steps
    assert isinstance(step, Resize)
    assert (step.layers, step.criterion) == (2, "cosine")


@pytest.mark.parametrize(
    ("steps", "export", "data", "kind", "pointer"),
    [
        ([RESIZE | {"exclude": ["model.layers.9"]}], ["native"], ("train",), InvalidSpec, "/steps/0/exclude/0"),
        ([RESIZE], ["native"], (), DatasetMismatch, "/dataset"),
        ([RESIZE | {"criterion": "greedy"}], ["native"], (), DatasetMismatch, "/dataset"),
        ([RESIZE | {"criterion": "taylor"}], ["native"], ("calibration",), DatasetMismatch, "/steps/0"),
        ([{"technique": "prune", "sparsity": 0.5}, RESIZE], ["native"], ("train",), OrderRefused, "/steps/1"),
        (
            [RESIZE, {"technique": "distill", "student": {"kind": "auto"}}],
            ["native"],
            ("train",),
            OrderRefused,
            "/steps/1",
        ),
        ([{"technique": "quantize"}, RESIZE], ["onnx"], ("train",), OrderRefused, "/steps/1"),
    ],
)
def test_what_does_not_fit_is_refused_at_its_place(
    steps: list[dict[str, Any]], export: list[str], data: tuple[str, ...], kind: type[TersorError], pointer: str
) -> None:
    facts: DatasetFacts | None = dataset_facts(*data) if data else None
    with pytest.raises(kind) as caught:
        check(spec(*steps, export=export), model(), facts)
    assert caught.value.pointer == pointer


def test_a_block_is_excluded_by_its_name() -> None:
    check(spec(RESIZE | {"exclude": ["model.layers.0", "model.layers.*.up"]}), model(), dataset_facts("train"))


def test_a_config_has_words_for_fewer_layers() -> None:
    folder = model(format="huggingface")
    asked = spec(RESIZE, export=["native", "packed", "compressed-tensors"])
    check(spec(RESIZE, export=["native", "packed"]), folder, dataset_facts("train"))
    assert planned(asked, folder) == ("native", "packed", "compressed-tensors")
    both = spec(RESIZE, {"technique": "factorize", "energy": 0.9}, export=["native"])
    assert planned(both, folder) == ("pt2",)


def test_a_model_that_cannot_be_trained_is_not_taken_apart() -> None:
    fixed = model(trainable=False, untrainable_reason="It is so.")
    with pytest.raises(Unsupported) as caught:
        check(spec(RESIZE, export=["native"]), fixed, dataset_facts("train"))
    assert caught.value.pointer == "/steps/0"


def test_the_greedy_way_takes_a_pass_for_every_block_that_is_left() -> None:
    own, data = model(cost=COST), dataset_facts("train", "calibration")

    def seconds(**fields: Any) -> float:
        return estimate(spec(RESIZE | fields, export=["native"]), own, data).seconds

    one = seconds(criterion="cosine")
    assert seconds(criterion="taylor") > one
    passes = [seconds(criterion="greedy", layers=layers) - one for layers in (1, 2, 3)]
    assert passes[1] / passes[0] == pytest.approx((8 + 7) / 8)  # of eight blocks
    assert passes[2] / passes[0] == pytest.approx((8 + 7 + 6) / 8)
    half: dict[str, Any] = {"layers": None, "budget": {"parameters": 0.625}}
    assert seconds(criterion="greedy", **half) == seconds(criterion="greedy", layers=3)
