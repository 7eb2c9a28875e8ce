"""Low-rank forms beside NumPy, and beside everything of the same rank that could be nearer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from worker.techniques.structure import factor_math


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_of_every_rank_it_is_the_truncated_decomposition(shape: tuple[int, int]) -> None:
    weight = randoms(*shape)
    metric = factor_math.plain(weight)
    u, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    tails = factor_math.spectrum(weight, metric).tails()
    assert tails.tolist() == pytest.approx([float((s[rank:] ** 2).sum()) for rank in range(len(s) + 1)], abs=1e-5)
    for rank in (1, 3, min(shape)):
        b, a = factor_math.spectrum(weight, metric).factors(rank)
        assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
        np.testing.assert_allclose((b @ a).numpy(), (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-5)


def reduced_rank_regression(weight: np.ndarray, inputs: np.ndarray, rank: int) -> np.ndarray:
    """The matrix of a rank whose outputs for `inputs` [columns, samples] are nearest to those of `weight`: the outputs'
    first principal directions, which a matrix of that rank is projected on (Izenman 1975)."""
    outputs = weight @ inputs
    u = np.linalg.svd(outputs, full_matrices=False)[0][:, :rank]
    return u @ u.T @ weight


def test_by_inputs_it_is_reduced_rank_regression() -> None:
    weight, inputs = randoms(8, 6), torch.diag(torch.tensor([5.0, 3.0, 1.0, 0.5, 0.2, 0.1])) @ randoms(6, 400, seed=1)
    metric = factor_math.by_inputs(weight, inputs @ inputs.T)
    for rank in (1, 2, 4):
        b, a = factor_math.spectrum(weight, metric).factors(rank)
        best = reduced_rank_regression(weight.double().numpy(), inputs.double().numpy(), rank)
        least = float(np.square((weight.double().numpy() - best) @ inputs.double().numpy()).sum())
        own = float(((weight - b @ a) @ inputs).square().sum())
        assert own == pytest.approx(least, rel=1e-3)
        tail = float(factor_math.spectrum(weight, metric).tails()[rank] * (inputs @ inputs.T).diagonal().mean())
        assert tail == pytest.approx(least, rel=0.05)  # and the ridge
        b, a = factor_math.spectrum(weight, factor_math.plain(weight)).factors(rank)
        assert own < float(((weight - b @ a) @ inputs).square().sum())


def test_factors_are_of_one_length_and_do_not_hang_on_how_many_samples_there_were() -> None:
    weight, inputs = randoms(6, 5), randoms(5, 50, seed=1)
    found = []
    for times in (1, 100):
        b, a = factor_math.spectrum(weight, factor_math.by_inputs(weight, times * inputs @ inputs.T)).factors(3)
        assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-4)
        found.append((b, a))
    assert torch.allclose(found[0][0].abs(), found[1][0].abs(), atol=1e-4)
    kernel = randoms(6, 5, 3, 3)
    metric = factor_math.by_inputs(kernel, inputs @ inputs.T)
    out, _, into = factor_math.tucker(factor_math.modes(kernel, metric), metric, 4, 3)
    assert torch.allclose(out.norm(dim=0), torch.ones(4))
    assert torch.allclose(into.norm(dim=1), torch.ones(3))


def test_inputs_that_never_vary_do_no_harm() -> None:
    weight, inputs = randoms(4, 5), randoms(5, 50, seed=1)
    inputs[2] = 0
    b, a = factor_math.spectrum(weight, factor_math.by_inputs(weight, inputs @ inputs.T)).factors(4)
    assert torch.allclose(b @ a @ inputs, weight @ inputs, atol=1e-3)
    silent = factor_math.by_inputs(weight, torch.zeros(5, 5))
    assert torch.isfinite(torch.cat([part.flatten() for part in factor_math.spectrum(weight, silent).factors(2)])).all()


def test_outputs_that_matter_are_kept_closer() -> None:
    weight, information = randoms(6, 6), torch.tensor([100.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    b, a = factor_math.spectrum(weight, factor_math.by_outputs(weight, information)).factors(2)
    plain_b, plain_a = factor_math.spectrum(weight, factor_math.plain(weight)).factors(2)
    own, plain = (weight - b @ a).square().sum(1), (weight - plain_b @ plain_a).square().sum(1)
    assert own[0] < plain[0] / 5
    scale = (information / information.mean() + 1e-4).sqrt().numpy()
    u, s, vh = np.linalg.svd(scale[:, None] * weight.numpy(), full_matrices=False)
    np.testing.assert_allclose((b @ a).numpy(), (u[:, :2] * s[:2]) @ vh[:2] / scale[:, None], atol=1e-4)


@pytest.mark.parametrize("places", [(3,), (3, 3), (2, 3, 2)])
def test_tucker_of_full_ranks_is_the_kernel_and_of_less_as_near_as_it_says(places: tuple[int, ...]) -> None:
    kernel = randoms(7, 5, *places)
    metric = factor_math.plain(kernel)
    modes = factor_math.modes(kernel, metric)

    def product(outputs: int, inputs: int) -> Tensor:
        out, core, into = factor_math.tucker(modes, metric, outputs, inputs)
        assert (out.shape, into.shape) == ((7, outputs), (inputs, 5))
        assert core.shape == (outputs, inputs, *places)
        return torch.einsum("or,rs...,si->oi...", out, core, into)

    assert torch.allclose(product(7, 5), kernel, atol=1e-5)
    for ranks in ((2, 2), (5, 3), (1, 5)):
        error = float((kernel - product(*ranks)).square().sum())
        assert error <= float(modes.left_out()[ranks]) * (1 + 1e-5) + 1e-5


def test_what_tucker_leaves_out_is_what_a_projection_does() -> None:
    kernel = randoms(6, 4, 3, 3)
    left_out = factor_math.modes(kernel, factor_math.plain(kernel)).left_out()
    sides = kernel.numpy().reshape(6, -1), kernel.numpy().transpose(1, 0, 2, 3).reshape(4, -1)
    outputs, inputs = (np.linalg.svd(side, full_matrices=False)[0] for side in sides)
    for out, into in ((6, 4), (3, 2), (1, 4), (0, 0)):
        left = outputs[:, :out] @ outputs[:, :out].T
        right = inputs[:, :into] @ inputs[:, :into].T
        near = np.einsum("ab,bchw,cd->adhw", left, kernel.numpy(), right)
        expected = float(np.square(kernel.numpy() - near).sum())
        assert float(left_out[out, into]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 5, 3, 3)])
def test_cp_finds_a_tensor_of_its_rank_again(shape: tuple[int, ...]) -> None:
    factors = [randoms(size, 3, seed=place) for place, size in enumerate(shape)]
    letters = "abcd"[: len(shape)]
    kernel = torch.einsum(",".join(f"{letter}r" for letter in letters) + f"->{letters}", *factors)
    found, error = factor_math.cp(kernel, factor_math.plain(kernel), 3, seed=0)
    assert error < 1e-3 * float(kernel.square().sum())
    again = torch.einsum(",".join(f"{letter}r" for letter in letters) + f"->{letters}", *found)
    assert float((again - kernel).square().sum()) == pytest.approx(error, abs=1e-3)
    norms = torch.stack([factor.norm(dim=0) for factor in found])
    assert torch.allclose(norms, norms[:1].expand_as(norms), rtol=1e-3)


def test_metrics_come_off_the_factors_of_kernels_again() -> None:
    kernel, inputs = randoms(6, 5, 3, 3), randoms(5, 80, seed=1)
    for metric in (factor_math.by_inputs(kernel, inputs @ inputs.T), factor_math.by_outputs(kernel, randoms(6).abs())):
        modes = factor_math.modes(kernel, metric)
        out, core, into = factor_math.tucker(modes, metric, 6, 5)
        assert torch.allclose(torch.einsum("or,rs...,si->oi...", out, core, into), kernel, atol=1e-3)
        factors, error = factor_math.cp(kernel, metric, 30, seed=0)
        own = metric.of(kernel - factor_math.product(factors)).square().sum()
        assert float(own) == pytest.approx(error, rel=0.05, abs=1e-4)
