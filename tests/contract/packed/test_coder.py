"""The library's coder against the one of docs/packed.md, and what the file says of probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from app.contract.packed import models
from app.contract.packed.coder import Decoder, Encoder
from tests.contract.packed.by_hand import Coder


@pytest.mark.parametrize("symbols", [2, 3, 16, 250])
def test_the_stream_is_the_one_that_is_written_down(symbols: int) -> None:
    random = np.random.default_rng(symbols)
    chances = models.probabilities(random.integers(0, 200, symbols).astype(np.uint8))
    first, second = random.choice(symbols, (2, 2000), p=chances)
    coin = models.coin_probabilities(models.coin(3, 100))
    bits = (random.random(3000) < 0.03).astype(np.int64)
    encoder = Encoder()
    for part, model in ((first, chances), (bits, coin), (second, chances)):
        encoder.put(part, model)
    stream = encoder.finish()
    assert 8 * len(stream) == pytest.approx(encoder.bits, abs=40)
    words = np.frombuffer(stream + bytes(-len(stream) % 4), "<u4").tolist()
    ours, theirs = Decoder(stream), Coder(words)
    for part, model in ((first, chances), (bits, coin), (second, chances)):
        assert ours.take(len(part), model).tolist() == part.tolist()
        assert theirs.take(len(part), model.tolist()) == part.tolist()
    ours.finish()
    assert theirs.state == 0


def test_weights_are_powers_of_two_in_eighths() -> None:
    expected = [max(1, int(2 ** (24 - q % 8 / 8) + 0.5) >> q // 8) for q in range(256)]
    assert models.WEIGHTS.tolist() == expected


@pytest.mark.parametrize(("ones", "count"), [(1, 10), (5, 10), (9, 10), (1, 100_000), (99_999, 100_000), (333, 1000)])
def test_a_coin_is_nearly_as_fair_as_it_should_be(ones: int, count: int) -> None:
    none, one = models.coin_probabilities(models.coin(ones, count))
    assert none + one == 1
    share = ones / count
    extra = share * np.log2(share / one) + (1 - share) * np.log2((1 - share) / none)
    assert extra <= 0.01 * -(share * np.log2(share) + (1 - share) * np.log2(1 - share))


def test_a_coin_that_never_falls_otherwise_needs_no_symbols() -> None:
    assert (models.coin(0, 5), models.coin(5, 5)) == (models.NEVER, models.ALWAYS)
    assert {models.coin(n, 1 << 40) for n in range(1, 100)} < set(range(models.ALWAYS))
