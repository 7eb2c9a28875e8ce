"""Exact counts and the right weights, against a sort in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worker.techniques.pruning import selection_math as maths

# Few distinct values, so that most tensors have ties.
LAYERS = st.lists(
    st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=60), min_size=1, max_size=5
)
SPARSITIES = st.floats(min_value=0.01, max_value=0.95)

Choose = Callable[[Sequence[Tensor], Sequence[Tensor], float], list[Tensor]]


def smallest_overall(weights: Sequence[Tensor], kept: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    return maths.lowest_overall([weight.abs() for weight in weights], kept, sparsity)


def smallest_each(weights: Sequence[Tensor], kept: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    counts = [maths.removals(weight.numel(), sparsity) for weight in weights]
    return maths.lowest_each([weight.abs() for weight in weights], kept, counts)


def tensors(layers: list[list[float]]) -> list[Tensor]:
    return [torch.tensor(layer) for layer in layers]


def all_kept(weights: list[Tensor]) -> list[Tensor]:
    return [torch.ones_like(weight, dtype=torch.bool) for weight in weights]


def overall_by_sorting(layers: list[list[float]], sparsity: float) -> list[list[bool]] | None:
    """Sets each layer's largest aside, sorts the rest and takes the first; None where that is not enough."""
    entries: list[tuple[float, int, int]] = []
    for i, layer in enumerate(layers):
        order = sorted(range(len(layer)), key=lambda j: abs(layer[j]))
        free = order[: len(layer) - max(1, math.ceil(0.1 * (1 - sparsity) * len(layer)))]
        entries.extend((abs(layer[j]), i, j) for j in free)
    count = round(sum(map(len, layers)) * sparsity)
    if count > len(entries):
        return None
    dropped = [[False] * len(layer) for layer in layers]
    for _, i, j in sorted(entries)[:count]:
        dropped[i][j] = True
    return dropped


@settings(deadline=None)
@given(LAYERS, SPARSITIES)
def test_global_pruning_hits_the_count_and_takes_the_smallest(layers: list[list[float]], sparsity: float) -> None:
    weights = tensors(layers)
    expected = overall_by_sorting(layers, sparsity)
    if expected is None:
        with pytest.raises(ValueError, match="emptying a layer"):
            smallest_overall(weights, all_kept(weights), sparsity)
        return
    dropped = smallest_overall(weights, all_kept(weights), sparsity)
    assert sum(int(d.sum()) for d in dropped) == round(sum(map(len, layers)) * sparsity)
    assert all(not bool(d.all()) for d in dropped)
    # Among ties with protected weights the choice may differ; the magnitudes that go may not.
    gone = np.sort(np.concatenate([w[d].abs().numpy() for w, d in zip(weights, dropped, strict=True)]))
    wanted = np.sort(
        [abs(w) for layer, d in zip(layers, expected, strict=True) for w, x in zip(layer, d, strict=True) if x]
    )
    np.testing.assert_array_equal(gone, wanted)


@settings(deadline=None)
@given(LAYERS, SPARSITIES)
def test_layer_pruning_hits_the_count_in_every_layer(layers: list[list[float]], sparsity: float) -> None:
    weights = tensors(layers)
    for layer, dropped in zip(layers, smallest_each(weights, all_kept(weights), sparsity), strict=True):
        count = min(round(len(layer) * sparsity), len(layer) - 1)
        # A stable sort breaks ties by position.
        expected = np.zeros(len(layer), dtype=bool)
        expected[np.argsort(np.abs(layer), kind="stable")[:count]] = True
        np.testing.assert_array_equal(dropped.numpy(), expected)


@settings(deadline=None)
@given(LAYERS, SPARSITIES, SPARSITIES)
def test_a_second_pruning_continues_the_first(layers: list[list[float]], first: float, second: float) -> None:
    weights = tensors(layers)
    low, high = sorted((first, second))
    before = smallest_each(weights, all_kept(weights), low)
    pruned = [weight.masked_fill(gone, 0.0) for weight, gone in zip(weights, before, strict=True)]
    after = smallest_each(pruned, [~gone for gone in before], high)
    for layer, old, new in zip(layers, before, after, strict=True):
        assert bool((new | ~old).all())  # what was gone stays gone
        assert int(new.sum()) == min(round(len(layer) * high), len(layer) - 1)


@pytest.mark.parametrize("choose", [smallest_each, smallest_overall])
def test_a_pruned_weight_goes_before_a_zero_that_is_not(choose: Choose) -> None:
    weights = [torch.tensor([0.0, 0.0, 5.0, 6.0])]
    kept = [torch.tensor([True, False, True, True])]
    assert choose(weights, kept, 0.25)[0].tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("total", "sparsity", "count"), [(431_080, 0.8, 344_864), (10, 0.25, 2), (3, 0.5, 2), (7, 0.9, 6)]
)
def test_the_count_is_the_nearest_whole_number(total: int, sparsity: float, count: int) -> None:
    assert maths.removals(total, sparsity) == count


def test_lenet_300_100s_size_is_hit_to_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 784), (100, 300), (10, 100)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    total = sum(weight.numel() for weight in weights)
    dropped = smallest_overall(weights, all_kept(weights), 0.98)
    assert sum(int(d.sum()) for d in dropped) == round(0.98 * total)
    assert [tuple(d.shape) for d in dropped] == shapes


def test_a_layer_of_small_weights_keeps_its_floor() -> None:
    weights = [torch.full((1000,), 1e-6), torch.ones(1000)]
    dropped = smallest_overall(weights, all_kept(weights), 0.6)
    assert int((~dropped[0]).sum()) == math.ceil(0.1 * 0.4 * 1000)
    assert sum(int(d.sum()) for d in dropped) == 1200


def test_a_threshold_removes_what_is_below_and_nothing_else() -> None:
    weight = np.array([0.01, -0.01, 0.0099, -0.5, 0.0, np.nan], dtype=np.float32)
    (dropped,) = maths.below([torch.from_numpy(weight)], 0.01)
    np.testing.assert_array_equal(dropped.numpy(), np.abs(weight) < np.float32(0.01))
    assert dropped.tolist() == [False, False, True, False, True, False]


def test_weights_that_are_not_finite_are_never_the_smallest() -> None:
    weights = [torch.tensor([float("nan"), 1.0, float("inf"), 2.0])]
    assert smallest_each(weights, all_kept(weights), 0.5)[0].tolist() == [False, True, False, True]


def test_half_precision_is_ranked_as_it_is() -> None:
    weights = [torch.tensor([3.0, -1.0, 2.0, 0.5], dtype=torch.bfloat16)]
    assert smallest_each(weights, all_kept(weights), 0.5)[0].tolist() == [False, True, False, True]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_counts_add_up_and_stay_near_their_shares(layers: list[tuple[int, float]], share: float) -> None:
    counts, sparsities = [count for count, _ in layers], [sparsity for _, sparsity in layers]
    total = round(sum(count * sparsity for count, sparsity in layers))
    found = maths.apportioned(counts, sparsities, total)
    most = [count - 1 for count in counts]
    assert all(0 <= own <= limit for own, limit in zip(found, most, strict=True))
    assert sum(found) == min(total, sum(most))
    if all(count * sparsity <= count - 1 for count, sparsity in layers):
        assert all(abs(own - count * sparsity) <= 1 for own, (count, sparsity) in zip(found, layers, strict=True))


def test_of_each_group_the_highest_stay_and_of_equal_ones_the_first() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0], [-torch.inf, 1.0, -torch.inf, -torch.inf]])
    expected = [[True, False, True, False], [False, False, True, True], [False, False, True, True]]
    assert maths.lowest_of_groups(scores, 2).tolist() == expected
