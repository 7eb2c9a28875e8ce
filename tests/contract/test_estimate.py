"""Estimates by hand."""

from __future__ import annotations

from typing import Any

import pytest

from app.contract.estimate import (
    COMPILE_SECONDS,
    EXPORT_COPIES,
    EXPORT_SECONDS,
    FIXED_SECONDS,
    RUNTIME_BYTES,
    Estimate,
    estimate,
)
from app.contract.facts import Cost, LayerFacts
from app.contract.spec import ResolvedSpec
from tests.contract.facts import dataset_facts, model_facts, split_facts

COST = Cost(
    length=None,
    macs=1000,
    seconds=0.01,
    weight_bytes=4_000,
    activation_bytes=700,
    inference_bytes=4_700,
    training_bytes=20_000,
)
DATA = dataset_facts(
    splits={"train": split_facts(), "validation": split_facts(samples=20), "test": split_facts(samples=30)}
)
DISTILLED = {"epochs": 2, "batch_size": 50, "distill": {}}


def of(*steps: dict[str, Any], export: tuple[str, ...] = ("native", "onnx"), data: Any = DATA) -> Estimate:
    spec = ResolvedSpec.model_validate(
        {"model": "m", "dataset": "d", "recipe": None, "steps": steps, "export": export, "seed": 0}
    )
    return estimate(spec, model_facts(cost=COST), data)


STATIC = {
    "technique": "quantize",
    "calibration": {"samples": 60, "method": "minmax"},
    "rounding": "nearest",
    "equalize": False,
    "smooth": False,
}
AWARE = {"technique": "quantize", "method": "qat", "training": {"epochs": 1, "batch_size": 50, "distill": None}}
EVALUATED = 30 * 3  # test samples x (the upload and two artifacts)


@pytest.mark.parametrize(
    ("step", "passes"),
    [
        ({"technique": "prune", "sparsity": 0.5}, 0),
        ({"technique": "finetune", "training": {"epochs": 2}}, 2 * 100 * 3),
        ({"technique": "finetune", "training": {"steps": 7, "batch_size": 10}}, 70 * 3),
        ({"technique": "finetune", "training": DISTILLED}, 2 * 100 * 3 + 100),
        ({"technique": "finetune", "training": DISTILLED | {"distill": {"cache": {"max_bytes": 0}}}}, 2 * 100 * 4),
        ({"technique": "finetune", "training": {"steps": 1, "batch_size": 10, "distill": {}}}, 10 * 4),
        ({"technique": "distill", "student": {"kind": "auto"}, "training": DISTILLED}, 2 * 100 * 3 / 4 + 100),
        ({"technique": "finetune", "training": {"epochs": 2, "early_stopping": {}}}, 2 * (100 * 3 + 20)),
        ({"technique": "finetune", "training": {"epochs": 2, "schedule": "plateau"}}, 2 * (100 * 3 + 20)),
        ({"technique": "finetune", "training": {"averaging": {"kind": "swa"}}}, 100 * 3 + 100),
        ({"technique": "finetune", "training": {"averaging": {"kind": "ema"}}}, 100 * 3),
        # By hand, from what the quantizer does. Nearest, one way of finding ranges: the limits, two to judge.
        (STATIC, 60 * 3),
        # Histograms between the limits.
        (STATIC | {"calibration": {"samples": 60, "method": "mse"}}, 60 * 4),
        # Three files, each judged.
        (STATIC | {"calibration": {"samples": 60}}, 60 * (2 + 3 * 2)),
        # The graph as it is and one with factors: limits, and two to judge, of each.
        (STATIC | {"equalize": True}, 60 * (3 + 2 * 3)),
        # Smoothing looks at what comes into products before.
        (STATIC | {"smooth": True}, 60 * (3 + 2 * 3 + 1)),
        (STATIC | {"smooth": True, "equalize": True}, 60 * (3 + 3 * 3 + 1)),
        # What comes into the layers, for the means.
        (STATIC | {"bias_correction": True}, 60 * (3 + 1)),
        (STATIC | {"bias_correction": True, "per_channel": False}, 60 * 3),
        ({"technique": "quantize", "calibration": {"samples": 60}, "per_channel": False}, 60 * 18),
        # Both files are judged once more.
        (STATIC | {"or_dynamic": True}, 60 * (3 + 2 * 2)),
        ({"technique": "quantize", "method": "dynamic"}, 0),
        # Of 8 bits the limits that the training begins with; then as static, where what did not train is looked at.
        (AWARE | {"calibration": {"samples": 60, "method": "minmax"}}, 100 * 3 + 60 * (1 + 3 + 1)),
        (AWARE | {"calibration": {"samples": 60}}, 100 * 3 + 60 * (2 + 4 + 1)),
        (AWARE | {"bits": 4}, 100 * 3),
    ],
)
def test_seconds_are_passes(step: dict[str, Any], passes: int) -> None:
    assert of(step).seconds == pytest.approx(FIXED_SECONDS + 2 * EXPORT_SECONDS + 0.01 * (passes + EVALUATED))


def test_adaptive_rounding_takes_a_second_for_a_million_weights_that_are_no_embedding() -> None:
    layers = tuple(
        LayerFacts(name=kind, type=kind, shape=(1000, 2000), parameters=2_000_000) for kind in ("Linear", "Embedding")
    )
    steps = {rounding: STATIC | {"rounding": rounding} for rounding in ("nearest", "adaptive")}
    spec = {"model": "m", "dataset": "d", "recipe": None, "export": ("onnx",), "seed": 0}
    nearest, adaptive = (
        estimate(ResolvedSpec.model_validate(spec | {"steps": [step]}), model_facts(cost=COST, layers=layers), DATA)
        for step in (steps["nearest"], steps["adaptive"])
    )
    looks = 60 * 0.01  # at what comes into the layers
    assert adaptive.seconds - nearest.seconds == pytest.approx(2.0 + looks)


def test_a_program_of_integers_is_compiled_for_the_report() -> None:
    static = {"technique": "quantize"}
    assert of(static, export=("pt2",)).seconds == pytest.approx(of(static, export=("onnx",)).seconds + COMPILE_SECONDS)
    prune = {"technique": "prune", "sparsity": 0.5}
    assert of(prune, export=("pt2",)).seconds == pytest.approx(of(prune, export=("onnx",)).seconds)
    few = {"technique": "quantize", "method": "weight_only", "algorithm": "rtn"}
    assert of(few, export=("pt2",)).seconds == pytest.approx(of(few, export=("onnx",)).seconds + COMPILE_SECONDS)


def test_other_models_cost_what_they_cost() -> None:
    teacher, student = ("mdl_" + digit * 26 for digit in "12")
    named = {
        teacher: model_facts(cost=COST.model_copy(update={"seconds": 0.03, "weight_bytes": 9_000})),
        student: model_facts(cost=COST.model_copy(update={"seconds": 0.001, "weight_bytes": 1_000})),
    }
    step = {
        "technique": "distill",
        "student": {"kind": "model", "model": student},
        "training": {"epochs": 2, "distill": {"teacher": ["uploaded", teacher]}},
    }
    spec = ResolvedSpec.model_validate(
        {"model": "m", "dataset": "d", "recipe": None, "steps": [step], "export": ("native",), "seed": 0}
    )
    found = estimate(spec, model_facts(cost=COST), DATA, named)
    passes = 2 * 100 * 3 * 0.1 + 100 * (1 + 3) + 30 * 2
    assert found.seconds == pytest.approx(FIXED_SECONDS + EXPORT_SECONDS + 0.01 * passes)
    assert found.memory_bytes == RUNTIME_BYTES + 20_000 + 64 * 700 + 10_000


def test_steps_add_up_and_nothing_is_evaluated_without_labels() -> None:
    train = {"technique": "finetune", "training": {"epochs": 1}}
    found = of(train, train, export=("native",), data=dataset_facts("train"))
    assert found.seconds == pytest.approx(FIXED_SECONDS + EXPORT_SECONDS + 0.01 * 600)


def test_memory_is_that_of_the_hungriest_part() -> None:
    assert of({"technique": "prune", "sparsity": 0.5}).memory_bytes == RUNTIME_BYTES + EXPORT_COPIES * 4_000
    trained = of({"technique": "finetune", "training": DISTILLED})
    assert trained.memory_bytes == RUNTIME_BYTES + 20_000 + 50 * 700
    parts = {"batch_size": 50, "micro_batch_size": 10, "averaging": {"kind": "ema"}}
    averaged = of({"technique": "finetune", "training": parts})
    assert averaged.memory_bytes == RUNTIME_BYTES + 20_000 + 10 * 700 + 4_000


def test_what_comes_into_layers_is_held_twice_where_it_is_rounded() -> None:
    assert of(AWARE).memory_bytes == RUNTIME_BYTES + 20_000 + 50 * 2 * 700
    assert of(AWARE | {"bits": 4}).memory_bytes == RUNTIME_BYTES + 20_000 + 50 * 700


def test_layers_that_trained_on_steps_are_not_rounded_again() -> None:
    layers = tuple(
        LayerFacts(name=kind, type=kind, shape=(1000, 2000), parameters=2_000_000)
        for kind in ("Linear", "Conv2d", "ConvTranspose2d", "Embedding")
    )
    spec = {"model": "m", "dataset": "d", "recipe": None, "export": ("native", "onnx"), "seed": 0, "steps": [AWARE]}
    found = estimate(ResolvedSpec.model_validate(spec), model_facts(cost=COST, layers=layers), DATA)
    assert found.seconds == pytest.approx(of(AWARE).seconds + 2.0)


@pytest.mark.parametrize(
    ("training", "held"),
    [
        ({"batch_size": 48, "processes": 2}, 2 * 20_000 + 48 * 700),
        ({"batch_size": 48, "processes": 2, "hosts": 3}, 2 * 20_000 + 16 * 700),
        ({"batch_size": 48, "processes": 2, "micro_batch_size": 5}, 2 * 20_000 + 10 * 700),
        ({"batch_size": 48, "processes": 2, "hosts": 2, "sharded": True}, 2 * 5_000 + 24 * 700),
        ({"batch_size": 48, "processes": 2, "averaging": {"kind": "ema"}}, 2 * 24_000 + 48 * 700),
    ],
)
def test_processes_hold_a_training_each_and_share_the_batch(training: dict[str, Any], held: int) -> None:
    assert of({"technique": "finetune", "training": training}).memory_bytes == RUNTIME_BYTES + held
