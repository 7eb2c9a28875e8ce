"""Tables of times by units: what they say for a clock that is made up, and that a network is within its whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.worker.helpers import context_for, memory_data, tiny_model
from tests.worker.structure.nets import Found, found
from tests.worker.techniques.structure.test_costs import kept_of, model_of
from worker.evaluation.macs import module_macs
from worker.structure.groups import structure_of
from worker.structure.sound import without
from worker.techniques.structure import unit_latencies
from worker.techniques.structure.operators import Shape
from worker.techniques.structure.unit_latencies import Latencies, Table

PER_MAC = 1e-9  # seconds
REST = 0.25  # of the whole, that is no layer's


class Work:
    """Takes time by work."""

    def __init__(self, threads: int) -> None: ...

    def seconds(self, chain: Sequence[nn.Module], given: Shape) -> float:
        return PER_MAC * module_macs(
            nn.Sequential(*(own.to_empty(device="cpu") for own in chain)), (torch.zeros(given),)
        )


class Blocks(Work):
    """Rounds channels up to 16, as a processor with wide vectors does."""

    def seconds(self, chain: Sequence[nn.Module], given: Shape) -> float:
        (layer,) = chain
        return super().seconds(chain, given) * np.prod([-(-n // 16) * 16 / n for n in layer.weight.shape[:2]])


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_latencies, "Clock", Work)
    monkeypatch.setattr(unit_latencies, "layer_shares", lambda context: {})


def work(module: nn.Module, own: Found) -> float:
    return PER_MAC * module_macs(module, tuple(one[:1] for one in own.inputs[0]))


def latencies(name: str, folder: Path, rest: float = REST) -> tuple[Found, float, Latencies]:
    """Of a network whose layers take their work; and how long the whole does."""
    own = found(name)
    context = context_for(model_of(name, own), memory_data({}), folder)
    whole = work(own.module, own) / (1 - rest)
    return own, whole, Latencies(context, own.groups, whole)


@pytest.mark.parametrize("share", [1.0, 0.75, 0.5, 0.4])
@pytest.mark.parametrize("name", ["chain", "residual", "depthwise"])
def test_times_are_those_of_layers_without_the_units(name: str, share: float, tmp_path: Path) -> None:
    """What is timed is proportional to both sides of a weight, and so is what lies between."""
    own, whole, told = latencies(name, tmp_path)
    counts = kept_of(own, share)
    kept = {group.name: torch.arange(counts[group.name]) for group in own.groups}
    made, _ = without(own.module, own.structure, own.groups, kept)
    assert told({}) == pytest.approx(whole)
    assert told(counts) == pytest.approx(REST * whole + work(made, own))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "tied", "lstm_deep"])
def test_the_whole_is_the_network_whatever_its_layers_are(name: str, tmp_path: Path) -> None:
    own, whole, told = latencies(name, tmp_path)
    assert told({}) == pytest.approx(whole)
    assert told(kept_of(own, 0.5)) <= whole


def test_layers_that_take_longer_by_themselves_have_their_share_of_the_whole(tmp_path: Path) -> None:
    own, whole, told = latencies("chain", tmp_path, rest=-1.0)
    assert told({}) == pytest.approx(whole)
    assert told(kept_of(own, 0.5)) < 0.5 * whole


def test_what_is_timed_in_blocks_is_saved_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 channels, 8 take as long: only the layer that reads them along its rows gains."""
    monkeypatch.setattr(unit_latencies, "Clock", Blocks)
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 3), nn.Flatten(), nn.Linear(64 * 16, 4))
    context = context_for(tiny_model(module, shape=(3, 8, 8)), memory_data({}), tmp_path)
    structure = structure_of(module, (torch.randn(2, 3, 8, 8),))
    first, second = (group.name for group in structure.groups)
    told = Latencies(context, structure.groups, 1.0)
    assert told({first: 8}) == pytest.approx(told({}))
    assert told({second: 32}) < told({second: 48}) < told({})


def test_layers_whose_weight_is_computed_have_their_share_of_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_latencies, "layer_shares", lambda context: {"0": 0.5})
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 4))
    context = context_for(tiny_model(module, shape=(6,)), memory_data({}), tmp_path)
    (group,) = structure_of(module, (torch.randn(2, 6),)).groups
    told = Latencies(context, [group], 1.0)
    assert told({}) == pytest.approx(1)
    assert 0.5 < told({group.name: 4}) < 1


def test_a_table_lies_on_lines_between_what_was_timed() -> None:
    table = Table([2, 4], [3, 9], np.array([[1.0, 3.0], [2.0, 8.0]]))
    assert table.at(4, 9) == 8
    assert table.at(2, 6) == 2
    assert table.at(3, 6) == pytest.approx((2 + 5) / 2)
    assert table.at(1, 1) == 1  # below the least
