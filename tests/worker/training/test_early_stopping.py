"""When to stop, and what comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from app.contract.training import EarlyStopping
from worker.constraints import baked, impose_mask, masks
from worker.training.early_stopping import EarlyStopper


@pytest.mark.parametrize(
    ("patience", "min_delta", "metrics", "stops_after", "best"),
    [
        (1, 0.0, [0.5, 0.6, 0.6], 3, 2),
        (2, 0.0, [0.5, 0.4, 0.6, 0.5, 0.6], 5, 3),
        (1, 0.05, [0.5, 0.54], 2, 1),
        (3, 0.0, [0.1, 0.2, 0.3], None, 3),
        (1, 0.0, [0.0, 0.0], 2, 1),  # a metric of nothing is a first best as well
    ],
)
def test_patience_by_hand(
    patience: int, min_delta: float, metrics: list[float], stops_after: int | None, best: int
) -> None:
    stopper = EarlyStopper(nn.Linear(1, 1), EarlyStopping(patience=patience, min_delta=min_delta))
    stops = [stopper.judge(metric, epoch) for epoch, metric in enumerate(metrics, 1)]
    assert stops == [epoch == stops_after for epoch in range(1, len(metrics) + 1)]
    assert stopper.best_epoch == best


def test_without_an_epoch_judged_nothing_is_put_back() -> None:
    network = nn.Linear(2, 1)
    before = network.weight.detach().clone()
    EarlyStopper(network, EarlyStopping()).restore()
    assert torch.equal(network.weight, before)


@pytest.mark.parametrize("masked_before", [False, True])
def test_an_older_state_does_not_bring_pruned_weights_back(masked_before: bool) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    if masked_before:
        impose_mask(network, "0.weight", torch.ones(4, 4))
    stopper = EarlyStopper(network, EarlyStopping())
    stopper.judge(0.9, 1)
    best = {name: tensor.clone() for name, tensor in baked(network).state_dict().items()}
    kept = torch.eye(4, dtype=torch.bool)
    impose_mask(network, "0.weight", kept)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network[1].buffers()]:
            tensor.add_(1)
    stopper.restore()
    assert torch.equal(masks(network)["0.weight"], kept)
    delivered = baked(network).state_dict()
    assert torch.equal(delivered["0.weight"], best["0.weight"].masked_fill(~kept, 0.0))
    assert all(torch.equal(delivered[name], best[name]) for name in best if name != "0.weight")
