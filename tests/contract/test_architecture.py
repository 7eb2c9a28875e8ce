"""A declarative architecture: torch's own arguments and defaults, faults at their place, bounds on everything."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
from torch import nn

from app.contract.architecture import MAX_LAYERS, MAX_NESTING, DatasetSpec, ModelSpec, dataset_spec, model_spec
from app.contract.errors import DatasetRejected, ModelRejected
from app.contract.layers import LAYERS, TABLE

CONV = {"type": "Conv2d", "in_channels": 1, "out_channels": 6, "kernel_size": 5}
RELU = {"type": "ReLU"}

# Arguments that are ours or that torch hides behind *args, and defaults that a batch-first service has to change.
OWN = {"LSTM": {"output", "batch_first"}, "GRU": {"output", "batch_first"}, "TransformerEncoderLayer": {"batch_first"}}
HIDDEN = {"input_size", "hidden_size", "num_layers", "bias", "dropout", "bidirectional", "proj_size"}


def spec(*layers: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "task": "image-classification",
        "architecture": {"layers": list(layers)},
        "input": {"shape": [1, 28, 28], "dtype": "float32"},
    } | changes


def nested(depth: int) -> dict[str, Any]:
    layer = RELU
    for _ in range(depth):
        layer = {"type": "Sequential", "layers": [layer]}
    return layer


@pytest.mark.parametrize("name", TABLE)
def test_arguments_and_defaults_are_those_of_torch(name: str) -> None:
    kind = next(layer for layer in LAYERS if layer.__name__ == name)
    signature = inspect.signature(getattr(nn, name).__init__).parameters
    for argument, info in kind.model_fields.items():
        if argument == "type" or argument in OWN.get(name, set()):
            continue
        if name in ("LSTM", "GRU") and argument in HIDDEN and argument not in signature:
            continue
        assert argument in signature, argument
        theirs = signature[argument].default
        assert info.is_required() == (theirs is inspect.Parameter.empty), argument
        if not info.is_required() and argument != "activation":  # torch's default is the function relu
            assert info.default == theirs, argument


def test_recurrent_defaults_are_those_of_torch() -> None:
    for name in ("LSTM", "GRU"):
        kind = next(layer for layer in LAYERS if layer.__name__ == name)
        ours = kind.model_validate({"type": name, "input_size": 3, "hidden_size": 4})
        theirs = getattr(nn, name)(3, 4)
        for argument in HIDDEN & set(kind.model_fields):
            assert getattr(ours, argument) == getattr(theirs, argument), argument


def test_a_spec_survives_the_way_through_json() -> None:
    given = spec(
        CONV,
        {"type": "Residual", "layers": [{"type": "Identity"}], "shortcut": [{"type": "Dropout", "p": 0.1}]},
        {"type": "Parallel", "branches": [[nested(2)], []], "join": "add"},
        labels=["a", "b"],
    )
    parsed = ModelSpec.model_validate(given)
    assert ModelSpec.model_validate(json.loads(json.dumps(parsed.model_dump(mode="json")))) == parsed


def test_one_value_stands_for_every_axis() -> None:
    parsed = ModelSpec.model_validate(spec(CONV | {"stride": [2, 1]}))
    assert parsed.architecture is not None
    values = parsed.architecture.layers[0].model_dump()
    assert (values["kernel_size"], values["stride"], values["padding"]) == ((5, 5), (2, 1), (0, 0))


@pytest.mark.parametrize(
    ("layer", "pointer", "words"),
    [
        (CONV | {"colour": 1}, "/architecture/layers/0/colour", "Extra inputs"),
        (CONV | {"kernel_size": "5"}, "/architecture/layers/0/kernel_size/0", "valid integer"),
        (CONV | {"kernel_size": [5]}, "/architecture/layers/0/kernel_size/1", "Field required"),
        (CONV | {"out_channels": 0}, "/architecture/layers/0/out_channels", "greater than or equal to 1"),
        (CONV | {"out_channels": 1 << 40}, "/architecture/layers/0/out_channels", "less than or equal to 65536"),
        (CONV | {"bias": 1}, "/architecture/layers/0/bias", "boolean"),
        ({"type": "Conv2d"}, "/architecture/layers/0/in_channels", "Field required"),
        ({"type": "Lambda", "code": "import os"}, "/architecture/layers/0", "Lambda"),
        ({"type": "Sequential", "layers": []}, "/architecture/layers/0/layers", "at least 1"),
        ({"type": "Residual", "layers": [{"type": "ReLU", "x": 1}]}, "/architecture/layers/0/layers/0/x", "Extra"),
        ({"type": "Softmax", "dim": 1}, "/architecture", "logits"),
        ({"type": "LSTM", "input_size": 1, "hidden_size": 1, "batch_first": False}, None, "True"),
        ({"type": "BatchNorm2d", "num_features": 1, "track_running_stats": False}, None, "True"),
        (7, "/architecture/layers/0", "dictionary"),
    ],
)
def test_a_fault_is_reported_at_its_place(layer: Any, pointer: str | None, words: str) -> None:
    with pytest.raises(ModelRejected, match=words) as caught:
        model_spec(spec(layer), ModelRejected)
    assert pointer is None or caught.value.pointer == pointer


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (spec(*[RELU] * (MAX_LAYERS + 1)), "at most 1000"),
        (spec({"type": "Parallel", "branches": [[RELU] * 600, [RELU] * 600]}), "at most 1000"),
        (spec(nested(MAX_NESTING)), "nest at most 16"),
        (spec(nested(900)), "nest at most 16"),
        (spec(RELU, input={"shape": [65536, 65536]}), "elements"),
        (spec(RELU, input={"shape": [28, 28], "dtype": "object"}), "dtype"),
        (spec(RELU, labels=["a", "a"]), "twice"),
        (spec(RELU, task="poetry"), "task"),
        ({"task": "image-classification", "architecture": {"layers": [RELU]}}, "input"),
        ({"architecture": {"layers": [RELU]}, "input": {"shape": [1]}}, "needs a task"),
        ({"input": {"shape": [1]}}, "describes an architecture"),
        ({"colour": "red"}, "spec.colour"),
    ],
)
def test_a_spec_out_of_bounds_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelRejected, match=words):
        model_spec(given, ModelRejected)


def test_a_dataset_spec_takes_no_fields() -> None:
    assert DatasetSpec.model_json_schema()["additionalProperties"] is False


def test_the_schema_names_every_layer() -> None:
    schema = json.dumps(ModelSpec.model_json_schema())
    assert all(f'"{name}"' in schema for name in (*TABLE, "Sequential", "Residual", "Parallel"))


@pytest.mark.parametrize(
    ("sent", "shares"),
    [
        ({}, (0.1, 0.1, 0)),
        ({"split": {}}, (0.1, 0.1, 0)),
        ({"split": {"validation": 0.2, "seed": 7}}, (0.2, 0.1, 7)),
        ({"split": {"validation": 0, "test": 0.5}}, (0, 0.5, 0)),
        ({"split": False}, (0, 0, 0)),
    ],
)
def test_how_a_dataset_of_one_split_is_divided(sent: dict[str, Any], shares: tuple[float, float, int]) -> None:
    spec = dataset_spec(sent, DatasetRejected)
    assert (spec.split.validation, spec.split.test, spec.split.seed) == shares
    assert spec.model_dump(mode="json", exclude_unset=True) == sent  # what is stored is what was sent


@pytest.mark.parametrize(
    ("split", "pointer", "words"),
    [
        ({"validation": 1}, "/split/validation", "less than 1"),
        ({"test": -0.1}, "/split/test", "greater than or equal to 0"),
        ({"validation": 0.6, "test": 0.5}, "/split", "nothing to train on"),
        ({"seed": -1}, "/split/seed", "greater than or equal to 0"),
        ({"seed": 1.5}, "/split/seed", "integer"),
        ({"train": 0.5}, "/split/train", "not permitted"),
        (True, "/split", "dictionary"),
        (None, "/split", "dictionary"),
    ],
)
def test_shares_that_make_no_sense_are_refused_by_pointer(split: Any, pointer: str, words: str) -> None:
    with pytest.raises(DatasetRejected, match=words) as caught:
        dataset_spec({"split": split}, DatasetRejected)
    assert caught.value.pointer == pointer
