"""Budgets of time for products: estimates by layers, corrected by the network itself, whose clock is made up here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.contract.budgets import TimedBudget
from app.contract.errors import InvalidSpec
from app.contract.factorizing import Factorize
from tests.worker.helpers import context_for, memory_data, tiny_model
from worker.context import Context
from worker.evaluation.macs import module_macs
from worker.techniques.structure import factor_latencies, unit_limits
from worker.techniques.structure.candidates import Candidate, candidates
from worker.techniques.structure.factor_latencies import seconds
from worker.techniques.structure.factorize import FactorizeTechnique
from worker.techniques.structure.metrics import metrics
from worker.techniques.structure.operators import Shape
from worker.techniques.structure.ranking import Option, ranking

PER_MAC, PER_LAYER = 1e-9, 2e-5  # seconds of the clock: a product is work and calls


class Clock:
    """Takes time by work and by layers."""

    def __init__(self, context: Context) -> None:
        self.seconds = self.of(context.model.module)

    def of(self, module: nn.Module) -> float:
        layers = sum(isinstance(own, nn.Linear) for own in module.modules())
        return PER_MAC * module_macs(module, (torch.zeros(1, 64),)) + PER_LAYER * layers


class Work:
    """Estimates are work, here: they know nothing of what a call costs."""

    def __init__(self, threads: int) -> None: ...

    def seconds(self, chain: Sequence[nn.Module], given: Shape) -> float:
        return PER_MAC * module_macs(nn.Sequential(*chain), (torch.zeros(given),))


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    torch.manual_seed(0)
    sizes = (64, 512, 512, 256, 10)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    module = nn.Sequential(*[one for layer in layers for one in (layer, nn.ReLU())][:-1])
    monkeypatch.setattr(unit_limits, "Runtime", Clock)
    monkeypatch.setattr(factor_latencies, "Clock", Work)
    data = memory_data({"train": (torch.randn(64, 64), torch.randint(0, 10, (64,)))})
    return context_for(tiny_model(module, shape=(64,)), data, tmp_path)


def factorize(context: Context, **budget: float) -> float:
    """By how much of its time the network has."""
    before = Clock(context).seconds
    FactorizeTechnique().apply(Factorize(budget=TimedBudget(**budget)), context)
    return Clock(context).seconds / before


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_a_budget_of_time_is_met_by_the_clock(context: Context, share: float) -> None:
    assert 0.9 * share <= factorize(context, latency=share) <= share


def test_milliseconds_are_met(context: Context) -> None:
    whole = 1000 * Clock(context).seconds
    assert 0.9 * 0.6 <= factorize(context, latency_ms=0.6 * whole) <= 0.6


def test_a_time_that_cannot_be_kept_says_what_could_be(context: Context) -> None:
    with pytest.raises(InvalidSpec, match=r"lowest ranks .* of the latency are left, and the budget is 10\.0%"):
        factorize(context, latency=0.1)


def test_estimates_that_are_far_too_high_do_not_end_the_search(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every product seems to take nearly as long as the layer. The clock says otherwise: the smallest takes 0.31, and
    the search comes nearer."""
    usual = factor_latencies._table

    def high(*given: Any) -> list[float]:
        first, *others = usual(*given)
        return [first, *(0.9 * first + own / 20 for own in others)]

    monkeypatch.setattr(factor_latencies, "_table", high)
    assert 0.4 <= factorize(context, latency=0.6) <= 0.6


def options_of(context: Context) -> tuple[list[Candidate], list[list[Option]]]:
    step = Factorize(budget=TimedBudget(latency=0.5))
    layers = candidates(step, context.model)
    own = metrics(step, context, layers)
    return layers, [ranking(one, own[one.name], 0).options() for one in layers]


def test_a_table_of_times_follows_what_layers_and_products_take(context: Context) -> None:
    layers, options = options_of(context)
    told = seconds(context, layers, options, 1.0)
    for one, given, times in zip(layers, options, told, strict=True):
        work = [one.macs, *(one.macs_of(option.factors) for option in given)]
        assert times == pytest.approx([PER_MAC * own for own in work])


def test_layers_take_no_more_than_the_network(context: Context) -> None:
    """By themselves they would take three times as long."""
    layers, options = options_of(context)
    whole = PER_MAC * sum(one.macs for one in layers) / 3
    told = seconds(context, layers, options, whole)
    assert sum(own[0] for own in told) == pytest.approx(whole)
    assert told[0][1] / told[0][0] == pytest.approx(layers[0].macs_of(options[0][0].factors) / layers[0].macs)
