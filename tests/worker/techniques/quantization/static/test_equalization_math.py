"""Factors by hand, and what they have to bring about."""

from __future__ import annotations

import numpy as np

from worker.techniques.quantization.static.equalization_math import balance, equalized


def test_a_pair_by_hand() -> None:
    made = np.array([[[8.0, 1.0], [0.5, 0.25]]])  # two outputs that reach 8 and 0.5
    read = np.array([[[2.0, 1.0], [1.0, 8.0], [0.0, 3.0]]])  # three that read them: 2 and 8
    (scale,) = equalized([made, read], [(0, 1)])
    # sqrt(8 * 2) / 2 and sqrt(0.5 * 8) / 8: both sides reach 4, and 2.
    np.testing.assert_allclose(scale, [2.0, 0.25])
    np.testing.assert_allclose(made.max(2)[0] / scale, [4.0, 2.0])
    np.testing.assert_allclose(read.max(1)[0] * scale, [4.0, 2.0])


def test_dead_channels_are_left_alone() -> None:
    np.testing.assert_array_equal(balance(np.array([0.0, 3.0, 0.0]), np.array([2.0, 0.0, 0.0])), 1.0)


def test_a_chain_is_even_everywhere_in_the_end() -> None:
    """The middle layer's inputs and its outputs are of a pair each, so that one sweep is not enough."""
    random = np.random.default_rng(0)
    layers = [np.exp(2 * random.normal(size=(1, *shape))) for shape in ((6, 4), (5, 6), (3, 5))]
    first, second = equalized(layers, [(0, 1), (1, 2)])
    ends = [layers[0] / first[:, None], layers[1] * first / second[:, None], layers[2] * second]
    for made, read in ((ends[0], ends[1]), (ends[1], ends[2])):
        np.testing.assert_allclose(made.max(2).ravel(), read.max(1).ravel(), rtol=1e-2)
    before = layers[1].max(1).ravel()
    assert np.abs(layers[0].max(2).ravel() / before - 1).max() > 0.5, "it was uneven"


def test_groups_have_channels_of_their_own() -> None:
    """A depthwise layer of three channels between two others."""
    into = np.array([[[1.0, 9.0], [4.0, 1.0], [1.0, 1.0]]])
    depthwise = np.array([[[1.0]], [[1.0]], [[16.0]]])
    out = np.array([[[1.0, 4.0, 1.0]]])
    scales = equalized([into, depthwise, out], [(0, 1), (1, 2)])
    reach = depthwise.ravel() * scales[0] / scales[1]
    np.testing.assert_allclose(into.max(2).ravel() / scales[0], reach, rtol=1e-2)
    np.testing.assert_allclose(out.max(1).ravel() * scales[1], reach, rtol=1e-2)
    # All three reach as far as the cube root of their product.
    np.testing.assert_allclose(reach, np.cbrt([9.0, 16.0, 16.0]), rtol=1e-2)


def test_a_channel_that_is_next_to_dead_is_left_alone() -> None:
    """Its bias would be divided by a factor near to nothing."""
    made, read = np.array([1e-20, 3.0, 1e-3]), np.array([2.0, 12.0, 10.0])
    np.testing.assert_allclose(balance(made, read), [1.0, 0.5, 1e-2])
    np.testing.assert_allclose(balance(read, made), [1.0, 2.0, 1e2])
