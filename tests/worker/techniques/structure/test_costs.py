"""Costs by arithmetic are those that are counted on the network without the units."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from app.contract.facts import TensorFacts
from tests.worker.helpers import tiny_model
from tests.worker.structure.nets import Found, found
from worker.evaluation.macs import module_macs
from worker.model import Model
from worker.structure.sound import without
from worker.techniques.structure.costs import Costs

IMAGES = ("chain", "residual", "depthwise", "grouped", "convnext")
TOKENS = ("bert", "gpt2", "llama", "tied", "lstm_deep")


def model_of(name: str, own: Found) -> Model:
    (given,) = own.inputs[0]
    shape, dtype = tuple(given.shape[1:]), str(given.dtype).removeprefix("torch.")
    model = tiny_model(own.module, shape=shape)
    inputs = (TensorFacts(name="input", shape=shape, dtype=dtype),)  # type: ignore[arg-type]
    return replace(model, facts=model.facts.model_copy(update={"inputs": inputs}))


def kept_of(own: Found, share: float) -> dict[str, int]:
    return {group.name: max(1, round(share * group.units)) for group in own.groups}


def counted(measure: str, name: str, own: Found, counts: dict[str, int]) -> int:
    kept = {group.name: torch.arange(counts[group.name]) for group in own.groups}
    made, _ = without(own.module, own.structure, own.groups, kept)
    if measure == "macs":
        return module_macs(made, tuple(one[:1] for one in own.inputs[0]))
    return sum(one.numel() for one in made.parameters()) * (4 if measure == "bytes" else 1)


@pytest.mark.parametrize("share", [1.0, 0.7, 0.4])
@pytest.mark.parametrize("measure", ["parameters", "bytes"])
@pytest.mark.parametrize("name", [*IMAGES, *TOKENS])
def test_parameters_and_bytes_are_exact(name: str, measure: str, share: float) -> None:
    own = found(name)
    counts = kept_of(own, share)
    assert Costs(measure, model_of(name, own), own.groups)(counts) == counted(measure, name, own, counts)


@pytest.mark.parametrize("share", [1.0, 0.7, 0.4])
@pytest.mark.parametrize("name", IMAGES)
def test_macs_of_convolutions_and_linear_layers_are_exact(name: str, share: float) -> None:
    own = found(name)
    counts = kept_of(own, share)
    assert Costs("macs", model_of(name, own), own.groups)(counts) == pytest.approx(
        counted("macs", name, own, counts), rel=1e-9
    )


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("name", TOKENS)
def test_macs_of_sequences_are_near_and_never_less(name: str, share: float) -> None:
    """Products of activations are nobody's, and count as if all heads were there."""
    own = found(name)
    counts = kept_of(own, share)
    told, real = Costs("macs", model_of(name, own), own.groups)(counts), counted("macs", name, own, counts)
    assert told == pytest.approx(real, rel=0.25)
    assert told >= real * (1 - 1e-9)
    if share == 1:
        assert told == pytest.approx(real, rel=1e-9)


def test_groups_that_are_not_told_of_are_all_there() -> None:
    own = found("chain")
    costs = Costs("parameters", model_of("chain", own), own.groups)
    first = own.groups[0]
    assert costs({}) == costs({group.name: group.units for group in own.groups})
    assert costs({}) - costs({first.name: first.units - 1}) == 3 * 9 + 1 + 2 + 12 * 9  # a filter, its norm, its readers


def test_bytes_are_those_of_the_file() -> None:
    own = found("chain")
    model = model_of("chain", own)
    half = replace(model, stored=dict.fromkeys(own.module.state_dict(), torch.float16))
    assert Costs("bytes", half, own.groups)({}) == Costs("bytes", model, own.groups)({}) / 2
