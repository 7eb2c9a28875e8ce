"""Ranges against what is known of distributions, and against trying all of a fine grid."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from worker.techniques.quantization.static.ranges_math import (
    Histogram,
    Range,
    counted,
    entropy,
    least_squares,
    percentile,
    rounded,
)


def of(values: np.ndarray, bins: int = 4096) -> Histogram:
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    return Histogram(low, high, counted(values, low, high, bins))


@pytest.fixture
def normal() -> np.ndarray:
    return np.random.default_rng(0).normal(size=200_000)


def test_percentile_of_a_normal_distribution(normal: np.ndarray) -> None:
    found = percentile(of(normal), 99.0)
    expected = stats.norm.ppf(0.995)
    assert found.low == pytest.approx(-expected, abs=0.02)
    assert found.high == pytest.approx(expected, abs=0.02)


def test_percentile_of_positive_values_keeps_zero_and_cuts_one_end(normal: np.ndarray) -> None:
    found = percentile(of(np.abs(normal)), 99.0)
    assert found.low == 0
    assert found.high == pytest.approx(stats.norm.ppf(0.995), abs=0.02)


def test_all_of_them_is_the_whole_range(normal: np.ndarray) -> None:
    histogram = of(normal)
    found = percentile(histogram, 100.0)
    assert (found.low, found.high) == pytest.approx((normal.min(), normal.max()), abs=1e-9)


def test_zeros_do_not_count() -> None:
    """A network whose units are mostly off is no reason to cut off what the others say."""
    values = np.concatenate([np.zeros(1_000_000), np.linspace(0.01, 1, 100)])
    assert percentile(of(values), 99.9).high == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("levels", [16, 256])
def test_least_squares_of_a_normal_distribution_is_the_known_optimum(levels: int, normal: np.ndarray) -> None:
    """Symmetric uniform quantizers of a normal source (Max 1960): steps of 0.3352 for 16 levels, 0.0308 for 256."""
    found = least_squares(of(normal), levels)
    step = (found.high - found.low) / (levels - 1)
    assert step == pytest.approx({16: 0.3352, 256: 0.0308}[levels], rel=0.06)


def test_least_squares_is_no_worse_than_any_range_around(normal: np.ndarray) -> None:
    values = np.concatenate([normal, [30.0]])
    found = least_squares(of(values), 16)

    def error(own: Range) -> float:
        return float(np.square(rounded(values, own, 16) - values).mean())

    others = [Range(low, high) for low in np.linspace(-5, -1, 15) for high in np.linspace(1, 31, 40)]
    assert error(found) <= 1.03 * min(map(error, others))
    assert found.high < 10, "one value of 200,001 is not worth levels that all others lack"


def test_entropy_cuts_off_what_few_values_reach(normal: np.ndarray) -> None:
    found = entropy(of(np.concatenate([normal, np.full(3, 100.0)])))
    assert 2 < found.high < 30
    assert -6 < found.low < -2


def test_entropy_of_even_values_keeps_them_all() -> None:
    found = entropy(of(np.random.default_rng(0).uniform(0, 1, 100_000)))
    assert found.high > 0.97


@pytest.mark.parametrize("find", [lambda one: percentile(one, 99.9), least_squares, entropy])
def test_nothing_but_zeros(find: object) -> None:
    found = find(Histogram(0.0, 0.0, np.zeros(16, np.int64)))  # type: ignore[operator]
    assert (found.low, found.high) == (0, 0)


def test_zero_is_always_on_the_grid() -> None:
    for own in (Range(-0.37, 1.2), Range(0.0, 5.0), Range(-3.0, 0.0)):
        assert rounded(np.zeros(1), own)[0] == 0
        ends = rounded(np.array([own.low, own.high]), own)
        step = (own.high - own.low) / 255
        assert np.abs(ends - [own.low, own.high]).max() <= step
