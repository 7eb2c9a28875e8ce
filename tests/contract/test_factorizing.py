"""The factorize step: what it says, where it may stand, and what is written in its place."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.contract.compatibility import check
from app.contract.errors import DatasetMismatch, InvalidSpec, OrderRefused, TersorError, Unsupported
from app.contract.estimate import estimate
from app.contract.factorizing import Factorize
from app.contract.facts import DatasetFacts, LayerFacts, ModelFacts
from app.contract.native import planned
from app.contract.recipes import resolve
from app.contract.spec import JobSpec, ResolvedSpec
from tests.contract.facts import COST, dataset_facts, model_facts

MODEL = "mdl_" + "0" * 26
FACTORIZE = {"technique": "factorize", "budget": {"parameters": 0.5}}
LAYERS = (LayerFacts(name="0", type="Conv2d", shape=(8, 1, 3, 3), parameters=80),)


def spec(*steps: dict[str, Any], **fields: Any) -> ResolvedSpec:
    return resolve(JobSpec.model_validate({"model": MODEL, "steps": steps} | fields))


def model(**changes: Any) -> ModelFacts:
    return model_facts().model_copy(update={"layers": LAYERS, **changes})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of budget and energy"),
        ({"budget": {"macs": 0.5}, "energy": 0.9}, "exactly one of budget and energy"),
        ({"energy": 0.9, "allocation": "measured"}, "give budget instead of energy"),
        ({"budget": {}}, "not none"),
        ({"budget": {"macs": 0.5, "bytes": 0.5}}, "not macs and bytes"),
        ({"budget": {"macs": 1.0}}, "less than 1"),
        ({"budget": {"flops": 0.5}}, "flops"),
        ({"energy": 0.9, "method": "qr"}, "tucker"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Factorize(**fields)


@pytest.mark.parametrize(
    ("steps", "export", "data", "kind", "pointer"),
    [
        ([FACTORIZE | {"exclude": ["9"]}], ["native"], None, InvalidSpec, "/steps/0/exclude/0"),
        ([FACTORIZE | {"criterion": "activations"}], ["native"], None, DatasetMismatch, "/dataset"),
        ([FACTORIZE | {"allocation": "measured"}], ["native"], None, DatasetMismatch, "/dataset"),
        ([FACTORIZE | {"criterion": "fisher"}], ["native"], dataset_facts("calibration"), DatasetMismatch, "/steps/0"),
        ([{"technique": "prune", "sparsity": 0.5}, FACTORIZE], ["native"], None, OrderRefused, "/steps/1"),
        (
            [FACTORIZE, {"technique": "distill", "student": {"kind": "auto"}}],
            ["native"],
            dataset_facts("train"),
            OrderRefused,
            "/steps/1",
        ),
        ([{"technique": "quantize"}, FACTORIZE], ["onnx"], dataset_facts("train"), OrderRefused, "/steps/1"),
    ],
)
def test_what_does_not_fit_is_refused_at_its_place(
    steps: list[dict[str, Any]],
    export: list[str],
    data: DatasetFacts | None,
    kind: type[TersorError],
    pointer: str,
) -> None:
    with pytest.raises(kind) as caught:
        check(spec(*steps, export=export), model(), data)
    assert caught.value.pointer == pointer


def test_a_config_has_no_words_for_products() -> None:
    folder = model(format="huggingface")
    for export in ("packed", "compressed-tensors"):
        with pytest.raises(Unsupported, match="no words for layers") as caught:
            check(spec(FACTORIZE, export=[export]), folder, None)
        assert caught.value.pointer == "/export"
    asked = spec(FACTORIZE, export=["native", "pt2", "onnx"])
    assert planned(asked, folder) == ("pt2", "onnx")
    assert planned(asked, model()) == ("native", "pt2", "onnx")
    assert planned(spec({"technique": "prune", "sparsity": 0.5}, export=["native"]), folder) == ("native",)


def test_a_model_that_cannot_be_trained_is_not_taken_apart() -> None:
    with pytest.raises(Unsupported) as caught:
        check(spec(FACTORIZE, export=["native"]), model(trainable=False, untrainable_reason="It is so."), None)
    assert caught.value.pointer == "/steps/0"


def test_what_it_looks_at_takes_time() -> None:
    own, data = model(cost=COST), dataset_facts("train", "calibration")
    fields: list[dict[str, Any]] = [
        {}, {"criterion": "activations"}, {"criterion": "fisher"}, {"allocation": "measured"}
    ]  # fmt: skip
    taken = [estimate(spec(FACTORIZE | one, export=["native"]), own, data).seconds for one in fields]
    assert all(other > taken[0] for other in taken[1:])
