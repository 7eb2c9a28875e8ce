"""The fuse step: what it says, where it may stand, and what is written of it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.contract.compatibility import check
from app.contract.errors import InvalidSpec, OrderRefused, TersorError, Unsupported
from app.contract.facts import LayerFacts, ModelFacts
from app.contract.fusing import PASSES, Fuse
from app.contract.native import planned
from app.contract.recipes import resolve
from app.contract.spec import JobSpec, ResolvedSpec
from tests.contract.facts import dataset_facts, model_facts

MODEL = "mdl_" + "0" * 26
FUSE: dict[str, Any] = {"technique": "fuse"}
LAYERS = (
    LayerFacts(name="body.conv", type="Conv2d", shape=(8, 3, 3, 3), parameters=216),
    LayerFacts(name="body.norm", type="BatchNorm2d", shape=(8,), parameters=16),
)


def spec(*steps: dict[str, Any], **fields: Any) -> ResolvedSpec:
    return resolve(JobSpec.model_validate({"model": MODEL, "steps": steps} | fields))


def model(**changes: Any) -> ModelFacts:
    return model_facts().model_copy(update={"layers": LAYERS, **changes})


def test_all_passes_are_taken_where_none_is_named() -> None:
    (step,) = spec(FUSE).steps
    assert isinstance(step, Fuse)
    assert step.passes == PASSES
    assert not step.for_inference


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"passes": []}, "at least 1"),
        ({"passes": ["common", "common"]}, "names one twice"),
        ({"passes": ["relu"]}, "batch_norm"),
        ({"samples": 3}, "Extra inputs"),
    ],
)
def test_what_says_nothing_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Fuse(**fields)


@pytest.mark.parametrize(
    ("steps", "kind", "pointer"),
    [
        ([FUSE | {"exclude": ["head"]}], InvalidSpec, "/steps/0/exclude/0"),
        ([{"technique": "prune", "sparsity": 0.5}, FUSE], OrderRefused, "/steps/1"),
        ([{"technique": "quantize"}, FUSE], OrderRefused, "/steps/1"),
        ([FUSE, {"technique": "distill", "student": {"kind": "auto"}}], OrderRefused, "/steps/1"),
        ([FUSE | {"for_inference": True}, {"technique": "finetune"}], OrderRefused, "/steps/1"),
    ],
)
def test_what_does_not_fit_is_refused_at_its_place(
    steps: list[dict[str, Any]], kind: type[TersorError], pointer: str
) -> None:
    with pytest.raises(kind) as caught:
        check(spec(*steps, export=["native", "onnx"]), model(), dataset_facts("train"))
    assert caught.value.pointer == pointer


def test_training_may_follow_and_no_data_is_needed() -> None:
    check(spec(FUSE, {"technique": "finetune"}, export=["native"]), model(), dataset_facts("train"))
    check(spec({"technique": "finetune"}, FUSE | {"for_inference": True}), model(), dataset_facts("train"))
    check(spec(FUSE | {"exclude": ["body.norm", "body.conv"]}, export=["native"]), model(), None)


def test_a_config_has_no_words_for_layers_without_their_norms() -> None:
    folder = model(format="huggingface")
    with pytest.raises(Unsupported, match="no words for layers") as caught:
        check(spec(FUSE, export=["packed"]), folder, None)
    assert caught.value.pointer == "/export"
    assert planned(spec(FUSE, export=["native", "onnx"]), folder) == ("pt2", "onnx")
    assert planned(spec(FUSE | {"passes": ["dead"]}, export=["native"]), folder) == ("native",)
    assert planned(spec(FUSE, export=["native"]), folder.model_copy(update={"layers": LAYERS[:1]})) == ("native",)
    assert planned(spec(FUSE, export=["native"]), model()) == ("native",)


def test_a_graph_that_runs_as_it_is_stays_so() -> None:
    fixed = model(trainable=False, untrainable_reason="It is so.")
    with pytest.raises(Unsupported, match="It is so") as caught:
        check(spec(FUSE, export=["native"]), fixed, None)
    assert caught.value.pointer == "/steps/0"
