"""What numbers of units are tried, as a step says or as a machine likes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn

from app.contract.structured import StructuredPrune
from tests.worker.structure.nets import found
from worker.techniques.structure import multiples
from worker.techniques.structure.multiples import NARROW, WIDE, block, ladder
from worker.techniques.structure.operators import Shape


def asked(round_to: Any) -> StructuredPrune:
    return StructuredPrune(sparsity=0.5, round_to=round_to)


def sizes(name: str, round_to: Any) -> list[list[int]]:
    """By the rungs, of each group."""
    groups = found(name).groups
    return [[rung[group.name] for group in groups] for rung in ladder(asked(round_to), groups)]


def test_a_number_is_the_only_rung_and_no_more_than_all_units() -> None:
    """20 and 50 channels, 500 neurons."""
    assert sizes("lenet", 32) == [[20, 32, 32]]


@pytest.mark.parametrize(
    ("wide", "first"), [(WIDE, [[16, 16, 8], [8, 8, 8]]), (NARROW, [[8, 8, 8]])], ids=["wide", "narrow"]
)
def test_auto_is_what_convolutions_like_and_then_finer(
    wide: int, first: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiples, "block", lambda: wide)
    assert sizes("lenet", "auto") == [*first, [4, 4, 4], [1, 1, 1]]


def test_heads_are_whole_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiples, "block", lambda: WIDE)
    groups = found("bert").groups
    first = next(ladder(asked("auto"), groups))
    assert all(first[group.name] == (1 if group.in_blocks else min(8, group.units)) for group in groups)
    assert any(group.in_blocks for group in groups)


@pytest.mark.parametrize(("size", "expected"), [(16, WIDE), (8, NARROW)])
def test_a_block_is_what_is_computed_whether_it_is_full_or_not(
    size: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blocks:
        def __init__(self, threads: int) -> None: ...

        def seconds(self, chain: Sequence[nn.Conv2d], given: Shape) -> float:
            return float(-(-chain[0].out_channels // size))

    monkeypatch.setattr(multiples, "Clock", Blocks)
    assert block.__wrapped__() == expected
