"""Of what number of units groups keep a multiple, where the step leaves that to the machine."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from app.contract.structured import StructuredPrune
from worker.structure.groups import Group
from worker.techniques.structure.operators import Clock

WIDE, NARROW = 16, 8
FINER = (NARROW, 4, 1)  # behind what the machine likes, where a budget is not met
ALIKE = 0.9  # of the time of 32 channels, from which on 24 take as long


def ladder(step: StructuredPrune, groups: Sequence[Group]) -> Iterator[Mapping[str, int]]:
    """By the name of each group, what to try, one after the other: what the step says, or what this machine likes first
    and then finer ones. Heads are whole by themselves."""
    if step.round_to != "auto":
        yield _of(groups, step.round_to, step.round_to)
        return
    convolved = any(_is_convolved(group) for group in groups)
    if convolved and block() == WIDE:
        yield _of(groups, NARROW, WIDE)
    for size in FINER:
        yield _of(groups, size, size)


def _of(groups: Sequence[Group], features: int, channels: int) -> dict[str, int]:
    return {
        group.name: 1 if group.in_blocks else min(channels if _is_convolved(group) else features, group.units)
        for group in groups
    }


def _is_convolved(group: Group) -> bool:
    """Whether convolutions make the units."""
    return any(cut.made and len(cut.shape) > 2 for cut in group.cuts)


@functools.cache
def block() -> int:
    """How many channels ONNX Runtime's convolutions compute at once on this machine: with AVX-512 it holds them in
    blocks of 16, and what a block lacks is computed too."""
    clock = Clock(threads=1)
    some, more = (
        clock.seconds([nn.Conv2d(64, outputs, 3, padding=1, device="meta")], (1, 64, 14, 14)) for outputs in (24, 32)
    )
    return WIDE if some > ALIKE * more else NARROW
