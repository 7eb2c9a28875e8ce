"""Steps with a limit that bits, or layers left in float, are found for: what is taken, refused and estimated."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.contract.compatibility import check
from app.contract.errors import DatasetMismatch, InvalidSpec, OrderRefused, Unsupported
from app.contract.estimate import EXPORT_SECONDS, FIXED_SECONDS, INPUT_PASSES, estimate
from app.contract.facts import DatasetFacts
from app.contract.mixed import MOST_MEASURED, MOST_TRIED, Mixed
from app.contract.recipes import resolve
from app.contract.spec import RANKED_ON, JobSpec, Quantize
from app.contract.weight_only import FewBits, WeightOnly
from tests.contract.facts import COST, dataset_facts, model_facts, split_facts

MIXED = {"technique": "quantize", "method": "mixed"}
LIMITED = MIXED | {"max_size": 0.1}
JUDGED = MIXED | {"max_accuracy_drop": 0.01}
LABELLED = dataset_facts("train", "validation")
UNLABELLED = dataset_facts(splits={"validation": split_facts(targets=None, target_min=None, target_max=None)})


def spec(*steps: dict[str, Any], **fields: Any) -> Any:
    return resolve(JobSpec.model_validate({"model": "mdl_" + "0" * 26, "steps": steps} | fields))


def test_a_step_is_the_method_it_names_and_has_what_weight_only_has() -> None:
    (step,) = spec(LIMITED).steps
    assert isinstance(step, Mixed)
    assert (step.bits, step.floats, step.group_size, step.algorithm) == ((8, 4, 3, 2), True, 128, "gptq")
    assert set(FewBits.model_fields) == set(WeightOnly.model_fields) & set(Mixed.model_fields) - {"method", "bits"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of max_size, max_latency and max_accuracy_drop"),
        ({"max_size": 0.1, "max_latency": 0.5}, "exactly one of"),
        ({"max_latency": 1.1}, "less than or equal to 1"),
        ({"max_latency": 0}, "greater than 0"),
        ({"max_size": 0.1, "max_accuracy_drop": 0.0}, "exactly one of"),
        ({"max_size": 0.1, "bits": [4, 4]}, "names a number twice"),
        ({"max_size": 0.1, "bits": []}, "at least 1"),
        ({"max_size": 0.1, "bits": [5]}, "8, 4, 3 or 2"),
        ({"max_size": 1.0}, "less than 1"),
        ({"max_size": 0.1, "group_size": 48}, "power of two"),
        ({"max_accuracy_drop": -0.1}, "greater than or equal to 0"),
        ({"max_size": 0.1, "embeddings": 4}, "Extra inputs"),
        (
            {"max_size": 0.1, "algorithm": "hqq", "symmetric": True},
            "hqq finds zero points, and symmetric leaves them out",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Mixed.model_validate(fields)


@pytest.mark.parametrize(
    ("step", "dataset", "pointer", "words"),
    [
        (LIMITED, None, "/dataset", "to measure what rounding a layer does"),
        (LIMITED, dataset_facts("test"), "/steps/0", r"has test \(100, classes\)"),
        (JUDGED, dataset_facts("train"), "/steps/0/max_accuracy_drop", "max_accuracy_drop needs a `validation` split"),
        (JUDGED, UNLABELLED, "/steps/0/max_accuracy_drop", "with classes"),
        (
            {"technique": "quantize", "max_accuracy_drop": 0.1},
            dataset_facts("train"),
            "/steps/0/max_accuracy_drop",
            "split",
        ),
        (
            {"technique": "quantize", "method": "dynamic", "max_accuracy_drop": 0.1},
            None,
            "/steps/0/max_accuracy_drop",
            "names no dataset",
        ),
    ],
)
def test_data_that_is_missing_is_named(
    step: dict[str, Any], dataset: DatasetFacts | None, pointer: str, words: str
) -> None:
    with pytest.raises(DatasetMismatch, match=words) as caught:
        check(spec(step), model_facts(), dataset)
    assert caught.value.pointer == pointer
    check(spec(step), model_facts(), LABELLED)


def test_nothing_follows_and_patterns_match() -> None:
    with pytest.raises(OrderRefused, match="last step"):
        check(spec(LIMITED, {"technique": "prune", "sparsity": 0.5}), model_facts(), LABELLED)
    with pytest.raises(InvalidSpec, match="matches no layer") as caught:
        check(spec(LIMITED | {"exclude": ["nowhere"]}), model_facts(), LABELLED)
    assert caught.value.pointer == "/steps/0/exclude/0"


def test_compressed_tensors_takes_bits_that_its_readers_know() -> None:
    folder = model_facts(format="huggingface")

    def asked(**fields: Any) -> Any:
        return spec(LIMITED | fields, export=["compressed-tensors"])

    check(asked(symmetric=True, bits=[8, 4, 2]), folder, LABELLED)
    for fields, pointer in (({"bits": [8, 4]}, "symmetric"), ({"symmetric": True}, "bits")):
        with pytest.raises(InvalidSpec) as caught:
            check(asked(**fields), folder, LABELLED)
        assert caught.value.pointer == f"/steps/0/{pointer}"
    with pytest.raises(Unsupported):
        check(asked(symmetric=True, bits=[4]), model_facts(), LABELLED)


def test_large_models_are_measured_with_few_samples() -> None:
    step = Mixed(max_size=0.1, samples=100)
    assert step.measured_on(1_000_000, 20) == 100
    assert step.measured_on(135_000_000, 210) == 1
    assert step.measured_on(25_000_000, 54) == MOST_MEASURED // (25_000_000 * 54 * 4) == 37
    assert Mixed(max_size=0.1, bits=(4,)).measured_on(135_000_000, 210) == 7


@pytest.mark.parametrize(
    ("step", "passes"),
    [
        (LIMITED | {"algorithm": "rtn", "samples": 50}, 4 * 50),
        (LIMITED | {"samples": 50, "bits": [8, 4]}, 2 * 50 + 3 * 50 * INPUT_PASSES),
        (JUDGED | {"samples": 500, "algorithm": "rtn"}, 4 * 100 + MOST_TRIED * 100),
        (JUDGED | {"samples": 500}, 4 * 100 + 100 * INPUT_PASSES + MOST_TRIED * (100 * INPUT_PASSES + 100)),
        ({"technique": "quantize", "method": "dynamic", "max_accuracy_drop": 0.1}, RANKED_ON + 4 * 100),
    ],
)
def test_passes_are_counted(step: dict[str, Any], passes: float) -> None:
    cost = COST.model_copy(update={"seconds": 0.01})
    found = estimate(spec(step, export=["onnx"]), model_facts(cost=cost), LABELLED)
    evaluated = 100 * 2  # on validation, in the absence of a test split
    assert found.seconds == pytest.approx(FIXED_SECONDS + EXPORT_SECONDS + 0.01 * (passes + evaluated))


def test_int8_takes_no_limit_below_nothing() -> None:
    assert Quantize().max_accuracy_drop is None
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Quantize(max_accuracy_drop=-1)


def test_a_limit_of_time_wants_the_runtime_that_it_is_measured_in() -> None:
    timed = MIXED | {"max_latency": 0.8}
    with pytest.raises(OrderRefused, match="add 'onnx' to export") as refused:
        check(spec(timed, export=["native"]), model_facts(), LABELLED)
    assert refused.value.pointer == "/export"
    check(spec(timed, export=["native", "onnx"]), model_facts(), LABELLED)
