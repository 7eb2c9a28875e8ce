"""The allocation beside trying everything, and bytes by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from worker.techniques.knapsack_math import Option, frontier
from worker.techniques.quantization.mixed_math import stored_bytes

Layers = list[list[Option]]


def some(layers: int, options: int, seed: int) -> Layers:
    """Sizes and losses at random; larger is mostly, and not always, better."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 60, (layers, options))
    losses = random.random((layers, options)) / sizes
    return [list(zip(map(int, own), map(float, lost), strict=True)) for own, lost in zip(sizes, losses, strict=True)]


def of(layers: Layers, choice: tuple[int, ...] | list[int]) -> Option:
    chosen = [own[place] for own, place in zip(layers, choice, strict=True)]
    return sum(size for size, _ in chosen), sum(loss for _, loss in chosen)


def every(layers: Layers) -> list[Option]:
    return [of(layers, choice) for choice in itertools.product(*(range(len(own)) for own in layers))]


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_within_a_limit_is_better(seed: int) -> None:
    layers = some(layers=5, options=4, seed=seed)
    found, ways = frontier(layers), every(layers)
    for limit in range(min(size for size, _ in ways), 310, 7):
        best = min(loss for size, loss in ways if size <= limit)
        point = found.within(limit)
        assert point is not None
        assert found.losses[point] == pytest.approx(best, rel=1e-12)
        assert found.sizes[point] <= limit
        assert of(layers, found.choice(point)) == pytest.approx((found.sizes[point], found.losses[point]))
    assert found.within(min(size for size, _ in ways) - 1) is None


def test_points_are_ever_larger_and_better() -> None:
    found = frontier(some(layers=8, options=5, seed=3))
    assert (np.diff(found.sizes) > 0).all()
    assert (np.diff(found.losses) < 0).all()


def test_few_points_are_nearly_as_good_and_keep_to_the_limit() -> None:
    layers = some(layers=30, options=5, seed=1)
    exact, rough = frontier(layers), frontier(layers, most=64)
    assert len(rough) <= 65 < len(exact)
    for limit in range(int(exact.sizes[0]), int(exact.sizes[-1]), 40):
        mine, best = rough.within(limit), exact.within(limit)
        assert mine is not None
        assert best is not None
        assert of(layers, rough.choice(mine))[0] == rough.sizes[mine] <= limit
        wider = exact.within(limit - int(exact.sizes[-1] - exact.sizes[0]) * 5 // 64)
        assert wider is None or rough.losses[mine] <= exact.losses[wider]
    assert rough.sizes[0] == exact.sizes[0]


def test_a_layer_that_breaks_gets_bytes_first() -> None:
    steady = [(1, 0.2), (2, 0.1), (4, 0.0)]
    fragile = [(1, float("inf")), (2, 50.0), (4, 0.0)]
    found = frontier([steady, fragile, steady])
    point = found.within(6)
    assert point is not None
    assert found.choice(point) == [0, 2, 0]


@pytest.mark.parametrize(
    ("bits", "group", "zero", "step", "expected"),
    [
        (4, 32, 0, 4, 10 * 64 // 2 + 20 * 4),
        (4, 32, 4, 4, 10 * 64 // 2 + 20 * 4 + 10),
        (3, 64, 3, 2, 240 + 10 * 2 + 4),  # 30 bits of zero points take 4 bytes
        (8, 16, 0, 2, 640 + 40 * 2),
        (2, 16, 32, 4, 160 + 40 * 4 + 40 * 4),
    ],
)
def test_bytes_by_hand(bits: int, group: int, zero: int, step: int, expected: int) -> None:
    assert stored_bytes(10, 64, bits, group, zero, step) == expected
