"""Means of weights, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from app.contract.optimizing import Ema, Swa
from app.contract.training import Training
from tests.worker.helpers import mlp
from worker.constraints import baked, impose_mask
from worker.training.averaging import ExponentialMean, StochasticMean, averaged

TOTAL, PER_EPOCH = 20, 4


def walk(mean: ExponentialMean | StochasticMean, layer: nn.Linear) -> list[torch.Tensor]:
    """Steps through random weights; all of them."""
    torch.manual_seed(1)
    seen = []
    for done in range(1, TOTAL + 1):
        with torch.no_grad():
            layer.weight.copy_(torch.randn_like(layer.weight))
        seen.append(layer.weight.detach().clone())
        mean.step(done)
    return seen


def test_an_exponential_mean_by_hand() -> None:
    layer = nn.Linear(3, 2)
    mean = ExponentialMean(layer, Ema(decay=0.6))
    seen = walk(mean, layer)
    expected = seen[0]
    for n, weight in enumerate(seen[1:], 1):
        decay = min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    with mean.shown():
        torch.testing.assert_close(layer.weight.detach(), expected)
    assert torch.equal(layer.weight, seen[-1])
    mean.finish([])
    torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize(
    ("rule", "points"),
    [
        (Swa(), [19, 20]),  # from step 15 on, every epoch of four steps, and the last
        (Swa(start=0.5, every=3), [13, 16, 19, 20]),
        (Swa(start=0.0, every=100), [20]),
    ],
)
def test_a_plain_mean_by_hand(rule: Swa, points: list[int]) -> None:
    layer = nn.Linear(3, 2)
    mean = StochasticMean(layer, rule, TOTAL, PER_EPOCH)
    seen = walk(mean, layer)
    with mean.shown():
        assert torch.equal(layer.weight, seen[-1])
    mean.finish([])
    expected = torch.stack([seen[done - 1] for done in points]).mean(0)
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_batch_norm_is_measured_anew_for_a_plain_mean() -> None:
    network = mlp(norm=True)
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm1d)
    mean = StochasticMean(network, Swa(start=0.0, every=1), 1, 1)
    mean.step(1)
    batches = list(torch.randn(96, 64).split(32))
    mean.finish((batch,) for batch in batches)
    hidden = [network[0](batch).detach() for batch in batches]
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert norm.momentum == 0.1


@pytest.mark.parametrize("rule", [Ema(), Swa(start=0.0, every=1)])
def test_masks_that_come_while_it_averages_hold(rule: Ema | Swa) -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    mean = averaged(network, Training(averaging=rule), TOTAL, PER_EPOCH)
    assert mean is not None
    kept = torch.eye(4, dtype=torch.bool)
    for done in range(1, TOTAL + 1):
        if done == 10:
            impose_mask(network, "0.weight", kept)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1.0)
        mean.step(done)
    mean.finish([])
    weight = baked(network).state_dict()["0.weight"]
    assert not weight[~kept].any()
    assert weight[kept].all()


def test_it_goes_on_where_it_was() -> None:
    def run(cut: int | None) -> torch.Tensor:
        layer = nn.Linear(3, 2)
        mean = ExponentialMean(layer, Ema())
        torch.manual_seed(0)
        for done in range(1, 9):
            with torch.no_grad():
                layer.weight.copy_(torch.randn_like(layer.weight))
            if done == cut:
                state = {
                    name: value.clone() if isinstance(value, torch.Tensor) else value
                    for name, value in mean.state().items()
                }
                mean = ExponentialMean(layer, Ema())
                mean.load(state)
            mean.step(done)
        mean.finish([])
        return layer.weight.detach()

    assert torch.equal(run(None), run(5))


def test_without_it_there_is_none() -> None:
    assert averaged(nn.Linear(1, 1), Training(), TOTAL, PER_EPOCH) is None
