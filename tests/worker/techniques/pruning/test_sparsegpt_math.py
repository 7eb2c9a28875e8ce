"""SparseGPT against the optimum by least squares, and against the step of optimal brain surgeon by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from worker.techniques.pruning import sparsegpt_math as maths


def samples(columns: int, seed: int = 0) -> Tensor:
    """Inputs whose columns have to do with each other, [columns, samples]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    return (mixing @ torch.randn(columns, 4 * columns, generator=generator)).float()


def weight(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def lost(before: Tensor, after: Tensor, inputs: Tensor) -> float:
    return float(((before - after) @ inputs).square().sum())


def all_kept(of: Tensor) -> Tensor:
    return torch.ones_like(of, dtype=torch.bool)


def test_one_removed_column_is_made_up_for_as_obs_says() -> None:
    """Of the first column: w - w_0 / [H^-1]_00 * H^-1[0] (Hassibi & Stork 1993)."""
    inputs = samples(6)
    moments = inputs @ inputs.T
    damped = moments.double() + maths.DAMPING * moments.diagonal().mean().double() * torch.eye(6)
    inverse = torch.linalg.inv(damped)
    before = weight(1, 6)
    before[0, 0] = 1e-3  # so that it is the one that goes
    after, dropped = maths.pruned(before, moments, all_kept(before), 1 / 6)
    assert dropped.tolist() == [[True, *[False] * 5]]
    expected = before.double() - before[0, 0] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(after.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("sparsity", "groups"), [(0.5, None), (0.75, None), (None, (2, 4)), (None, (1, 4))])
def test_it_loses_less_than_magnitude_and_no_less_than_the_optimum(
    sparsity: float | None, groups: tuple[int, int] | None
) -> None:
    inputs, before = samples(160), weight(24, 160)
    moments = inputs @ inputs.T
    after, dropped = maths.pruned(before, moments, all_kept(before), sparsity, groups)
    assert not after[dropped].any()
    if groups is None:
        assert int(dropped.sum()) == round(before.numel() * sparsity)  # type: ignore[operator]
        smallest = before.abs() <= before.abs().flatten().kthvalue(int(dropped.sum())).values
    else:
        assert bool((dropped.view(-1, groups[1]).sum(1) == groups[1] - groups[0]).all())
        order = before.abs().view(-1, groups[1]).argsort(1)
        smallest = torch.zeros_like(before, dtype=torch.bool).view(-1, groups[1])
        smallest.scatter_(1, order[:, : groups[1] - groups[0]], True)
        smallest = smallest.view(before.shape)
    by_magnitude = lost(before, before.masked_fill(smallest, 0), inputs)
    best = np.zeros_like(before.numpy())
    for row, gone in enumerate(dropped.numpy()):  # the same mask, with the weights of least squares
        own = inputs.numpy()[~gone].T
        best[row, ~gone] = np.linalg.lstsq(own, inputs.numpy().T @ before.numpy()[row], rcond=None)[0]
    optimum = lost(before, torch.from_numpy(best), inputs)
    assert optimum * 0.999 <= lost(before, after, inputs) < 1.05 * optimum
    assert lost(before, after, inputs) < 0.8 * by_magnitude


def test_what_was_pruned_before_goes_first() -> None:
    inputs, before = samples(32), weight(8, 32)
    held = torch.rand(before.shape, generator=torch.Generator().manual_seed(3)) < 0.7
    before = before * held
    for sparsity, groups in ((0.5, None), (None, (2, 4))):
        after, dropped = maths.pruned(before, inputs @ inputs.T, held, sparsity, groups)
        if groups is None:
            assert bool(dropped[~held].all())
        assert not after[~held].any() or groups is not None
        assert not after[dropped].any()


def test_an_input_that_never_comes_needs_no_weight() -> None:
    inputs, before = samples(16), weight(4, 16)
    inputs[5] = 0
    after, _ = maths.pruned(before, inputs @ inputs.T, all_kept(before), 0.05)
    assert not after[:, 5].any()
    assert bool(after.isfinite().all())
