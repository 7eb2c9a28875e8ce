"""Parts of a network that may leave it, and how many of them do: blocks, or connections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from app.contract.errors import InvalidSpec
from worker.data.batch import Inputs
from worker.techniques.base import Details
from worker.techniques.pruning.weights import LAYERS_NAMED
from worker.techniques.structure.limits import Limit


class Part(Protocol):
    """What may go."""

    @property
    def name(self) -> str:
        """Unlike that of any other."""


PartT = TypeVar("PartT", bound=Part)
Influences = dict[str, float]
"""By a part's name."""
Order = Iterator[tuple[PartT, Influences]]
"""The next part to go, and what parts do as far as is known by then."""


class Parts(Protocol[PartT]):
    """Those of a network that may go, and what the network is without some."""

    @property
    def free(self) -> Sequence[PartT]:
        """In the network's order."""

    def may_go(self, one: PartT, gone: Sequence[PartT]) -> bool:
        """Whether it still may when others have."""

    def without(self, gone: Sequence[PartT]) -> AbstractContextManager[None]:
        """Meanwhile the network computes as if these were not there."""

    def watched(self, inputs: Inputs) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """What the network gives; and for each part what would be at its place without it, and what is there, on the
        way to the output."""


@dataclass(frozen=True)
class Choice:
    """The parts that go, by name and in the order in which they do, and what each does."""

    gone: tuple[str, ...]
    influences: Influences


def so_many(count: int, order: Order[PartT], what: str) -> Choice:
    """The first of the order. Raises InvalidSpec where there are too few; `what` is what they are called."""
    gone: list[str] = []
    for one, influences in order:
        gone.append(one.name)
        if len(gone) == count:
            return Choice(tuple(gone), dict(influences))
    raise InvalidSpec(f"{len(gone)} {what} may go, and {count} are asked for. Give fewer, or exclude less.")


def within(limit: Limit, order: Order[PartT], left_of: Callable[[Sequence[PartT]], float], what: str) -> Choice:
    """The fewest in this order that bring the network under a limit, of which `left_of` says what is left. Raises
    InvalidSpec, with what is reachable, where all are too few."""
    gone: list[PartT] = []
    left = limit.whole
    for one, influences in order:
        gone.append(one)
        left = left_of(gone)
        if left <= limit.most:
            return Choice(tuple(one.name for one in gone), dict(influences))
    raise InvalidSpec(
        f"Without all {len(gone)} {what} that may go {left / limit.whole:.1%} of the {limit.measure} are left, and the "
        f"budget is {limit.share:.1%}. Give a larger one, or exclude less."
    )


def shown(found: Sequence[Part]) -> str:
    """The names of the first few."""
    more = f" and {len(found) - LAYERS_NAMED} more" if len(found) > LAYERS_NAMED else ""
    return ", ".join(one.name for one in found[:LAYERS_NAMED]) + more


def told(found: Sequence[Part], kept: dict[str, str], choice: Choice, what: str, gone: str) -> Details:
    """What each part does and whether it is `gone`; and what could not go, with the reason."""
    rows: list[dict[str, float | int | str | None]] = [
        {"name": one.name, "influence": choice.influences.get(one.name), gone: int(one.name in choice.gone)}
        for one in found
    ]
    details: Details = {what: rows}
    if kept:
        details["left_alone"] = [{"name": name, "why": why} for name, why in kept.items()]
    return details
