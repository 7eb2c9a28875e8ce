"""What a job specification takes and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.contract.recipes import RECIPES, resolve
from app.contract.spec import JobSpec, Prune, Quantize

MODEL = "mdl_" + "0" * 26
DATASET = "dst_" + "0" * 26


def parse(**fields: Any) -> JobSpec:
    return JobSpec.model_validate({"model": MODEL, "dataset": DATASET} | fields)


def test_resolving_fills_in_every_default() -> None:
    resolved = resolve(parse(steps=[{"technique": "prune", "sparsity": 0.9}, {"technique": "quantize"}]))
    prune, quantize = resolved.steps
    assert isinstance(prune, Prune)
    assert isinstance(quantize, Quantize)
    assert (prune.within, prune.schedule, prune.granularity, prune.criterion) == (
        "global",
        "one_shot",
        "unstructured",
        "magnitude",
    )
    assert (quantize.method, quantize.dtype, quantize.per_channel, quantize.calibration.samples) == (
        "static",
        "int8",
        True,
        256,
    )
    assert resolved.export == ("native", "onnx")
    assert resolved.seed == 0


@pytest.mark.parametrize("recipe", [recipe.name for recipe in RECIPES])
def test_every_recipe_unfolds_into_its_steps(recipe: str) -> None:
    resolved = resolve(parse(recipe=recipe))
    assert resolved.steps
    assert resolved.recipe == recipe


def test_the_worked_example_is_what_the_literature_says() -> None:
    prune, quantize = resolve(parse(recipe="threshold-int8")).steps
    assert isinstance(prune, Prune)
    assert prune.training is not None
    assert (prune.threshold, prune.training.optimizer, prune.training.lr, prune.training.epochs) == (
        0.01,
        "adam",
        0.001,
        10,
    )
    assert isinstance(quantize, Quantize)
    assert quantize.dtype == "int8"


TOGETHER = {"technique": "finetune"}


def test_a_job_has_the_processes_of_its_trainings_and_tells_where_they_are() -> None:
    steps = [TOGETHER, TOGETHER | {"training": {"processes": 2, "hosts": 3}}]
    spec = resolve(parse(steps=steps))
    assert (spec.processes, spec.hosts) == (2, 3)
    assert spec.training_pointer("hosts") == "/steps/1/training/hosts"
    alone = resolve(parse(steps=[TOGETHER]))
    assert (alone.processes, alone.hosts) == (1, 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "recipe or steps"),
        ({"recipe": "int8", "steps": [{"technique": "finetune"}]}, "recipe or steps"),
        ({"steps": []}, "at least 1"),
        ({"steps": [{"technique": "shrink"}]}, "shrink"),
        ({"steps": [{"technique": "prune"}]}, "exactly one of sparsity and threshold"),
        ({"steps": [{"technique": "prune", "sparsity": 0.5, "threshold": 0.1}]}, "exactly one"),
        ({"steps": [{"technique": "prune", "sparsity": 1.0}]}, "less than 1"),
        ({"steps": [{"technique": "prune", "sparsity": 0.5, "schedule": "cubic"}]}, "give training"),
        ({"steps": [{"technique": "prune", "threshold": 0.1, "schedule": "cubic", "training": {}}]}, "give sparsity"),
        ({"steps": [{"technique": "finetune", "training": {"epochs": 1, "steps": 1}}]}, "not both"),
        ({"steps": [{"technique": "finetune", "training": {"lr": float("nan")}}]}, "finite"),
        ({"steps": [{"technique": "finetune", "training": {"optimizer": "lion"}}]}, "'sgd'"),
        ({"steps": [TOGETHER | {"training": {"processes": n}} for n in (2, 1, 3)]}, "agree in hosts and processes"),
        ({"steps": [TOGETHER | {"training": {"processes": 2, "hosts": n}} for n in (2, 1)]}, "agree in hosts"),
        ({"recipe": "int8", "speed": 3}, "Extra inputs"),
        ({"recipe": "int8", "export": ["onnx", "onnx"]}, "twice"),
        ({"recipe": "int8", "seed": -1}, "greater than or equal to 0"),
        ({"recipe": "int8", "metadata": {"x": "y" * 20_000}}, "metadata is larger"),
    ],
)
def test_refuses_with_a_sentence(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        parse(**fields)


def test_training_without_a_length_is_one_epoch() -> None:
    (step,) = resolve(parse(steps=[{"technique": "finetune"}])).steps
    assert getattr(step, "training").epochs == 1  # noqa: B009 - the union has steps without training
