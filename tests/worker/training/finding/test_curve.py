"""The range test's mathematics, against NumPy and curves whose steepest point is known."""

from __future__ import annotations

import numpy as np
import pytest

from worker.training.finding.curve import blown_up, geometric, smoothed, suggestion


def test_rates_are_evenly_spaced_in_the_logarithm() -> None:
    np.testing.assert_allclose(geometric(1e-6, 10.0, 15), np.geomspace(1e-6, 10.0, 15), rtol=1e-12)
    assert geometric(0.5, 9.0, 1) == [0.5]


def test_smoothing_is_a_weighted_mean_of_all_so_far() -> None:
    losses = np.random.RandomState(0).rand(12)
    for count, found in enumerate(smoothed(losses.tolist(), beta=0.8), 1):
        weights = 0.8 ** np.arange(count)[::-1]
        assert found == pytest.approx(float(np.average(losses[:count], weights=weights)))


def test_the_suggestion_lies_between_the_steepest_point_and_a_tenth_of_the_lowest() -> None:
    """A logistic fall around 1e-3, at its lowest before a rise from 1 on."""
    rates = geometric(1e-6, 10.0, 701)
    losses = [2.3 - 2 / (1 + np.exp(-3 * np.log10(rate / 1e-3))) + max(0.0, np.log10(rate)) * 5 for rate in rates]
    found = suggestion(rates, losses)
    assert found is not None
    assert found == pytest.approx(np.sqrt(1e-3 * 1.0 / 10), rel=0.05)


def test_nothing_is_suggested_where_the_loss_never_falls() -> None:
    assert suggestion([0.1, 0.2, 0.4], [1.0, 1.0, 1.5]) is None


@pytest.mark.parametrize(
    ("losses", "says"),
    [([2.0, 1.5, 1.0, 2.9], False), ([2.0, 1.5, 1.0, 3.1], True), ([2.0, 2.1], False), ([2.0, 2.3], True)],
)
def test_a_curve_has_left_when_it_rose_by_as_much_as_it_fell(losses: list[float], says: bool) -> None:
    assert blown_up(losses) is says
