"""GPTQ against optimal brain quantization one weight at a time, and against all codes that there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.worker.techniques.pruning.test_sparsegpt_math import all_kept, lost, samples, weight
from worker.techniques.pruning.sparsegpt_math import damped
from worker.techniques.quantization import gptq_math
from worker.techniques.quantization.grid_math import Grid, least_squares


def rounded(before: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    """To the nearest."""
    return torch.cat([least_squares(own, bits, symmetric).rounded(own) for own in before.split(group, 1)], 1)


def test_without_sweeps_it_is_optimal_brain_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    """Column by column with the inverse of what is left (Frantar & Alistarh 2022), in float64."""
    monkeypatch.setattr(gptq_math, "SWEEPS", 0)
    inputs, before = samples(12), weight(5, 12)
    moments = inputs @ inputs.T
    codes, grids = gptq_math.quantized(before, moments, all_kept(before), 4, 12, symmetric=True)
    left, found = before.double(), torch.zeros(5, 12, dtype=torch.float64)
    hessian = damped(moments).double()
    grid = Grid(grids[0].step.double(), grids[0].zero.double(), grids[0].low, grids[0].high)
    for column in range(12):
        inverse = torch.linalg.inv(hessian[column:, column:])
        found[:, column] = grid.rounded(left[:, column : column + 1]).squeeze(1)
        error = (left[:, column] - found[:, column]) / inverse[0, 0]
        left[:, column:] -= error.outer(inverse[0])
    torch.testing.assert_close(gptq_math.values(codes, grids, 12).double(), found, rtol=1e-4, atol=1e-5)


def test_small_ones_come_near_the_best_codes_of_all() -> None:
    """Two bits, six columns: 4,096 ways to round a row."""
    inputs, before = samples(6), weight(8, 6)
    moments = inputs @ inputs.T
    codes, grids = gptq_math.quantized(before, moments, all_kept(before), 2, 6, symmetric=False)
    ways = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.float32)
    hessian = damped(moments)
    best = 0.0
    for row in range(8):
        errors = (ways - grids[0].zero[row]) * grids[0].step[row] - before[row]
        best += float(((errors @ hessian) * errors).sum(1).min())
    own = gptq_math.values(codes, grids, 6) - before
    assert best <= float(((own @ hessian) * own).sum()) * 1.0001 <= 1.3 * best


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, True), (3, 64, False), (2, 50, False)])
def test_it_loses_less_than_rounding_to_the_nearest(bits: int, group: int, symmetric: bool) -> None:
    inputs, before = samples(160), weight(24, 160)
    codes, grids = gptq_math.quantized(before, inputs @ inputs.T, all_kept(before), bits, group, symmetric)
    assert len(grids) == -(-160 // group)
    assert torch.equal(codes, codes.round())
    assert (int(codes.min()) >= grids[0].low) & (int(codes.max()) <= grids[0].high)
    nearest = lost(before, rounded(before, bits, group, symmetric), inputs)
    assert lost(before, gptq_math.values(codes, grids, group), inputs) < 0.5 * nearest


def test_sweeps_never_make_it_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, before = samples(96), weight(16, 96)
    losses = []
    for sweeps in range(4):
        monkeypatch.setattr(gptq_math, "SWEEPS", sweeps)
        codes, grids = gptq_math.quantized(before, inputs @ inputs.T, all_kept(before), 3, 32, symmetric=True)
        errors = gptq_math.values(codes, grids, 32) - before
        losses.append(float(((errors @ damped(inputs @ inputs.T)) * errors).sum()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.97 * losses[0]


def test_what_was_pruned_stays_zero() -> None:
    inputs, before = samples(64), weight(16, 64)
    kept = before.abs() > 0.6
    codes, grids = gptq_math.quantized(before, inputs @ inputs.T, kept, 4, 32, symmetric=False)
    found = gptq_math.values(codes, grids, 32)
    assert not found[~kept].any()
    assert lost(torch.where(kept, before, 0.0), found, inputs) < 0.05 * float((before @ inputs).square().sum())
