"""The largest student within a budget: candidates are as large as their share, so the share is found by halving."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from app.contract.distillation import AutoStudent
from app.contract.errors import Unsupported
from worker.data.batch import Inputs
from worker.evaluation.latency import measure_in_turns
from worker.evaluation.macs import module_macs

STEPS = 64  # shares of width and depth are tried in 64ths
LATENCY_SECONDS = 0.5  # of measuring one candidate beside the original


class Candidate(Protocol):
    """A smaller network that could be built."""

    def parameters(self) -> int: ...

    def network(self) -> nn.Module:
        """In eval mode; its weights may be anything."""


@dataclass(frozen=True)
class Original:
    """What budgets are shares of."""

    network: nn.Module
    parameters: int
    example: Inputs
    threads: int


def largest(student: AutoStudent, original: Original, candidate: Callable[[float], Candidate]) -> tuple[float, float]:
    """The largest share in (0, 1) whose candidate keeps the budget, and the share of the budget's measure it has.

    Raises Unsupported where not even the smallest does, with what that has.
    """
    name, allowed = _budget(student)
    cost = functools.cache(lambda step: _cost(name, candidate(step / STEPS), original))
    low, high = 1, STEPS
    if cost(low) > allowed:
        raise Unsupported(
            f"The smallest student that can be made of this model has {cost(low):.1%} of its {name}; "
            f"the budget is {allowed:.1%}. Describe a smaller one with kind: architecture."
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= allowed else (low, middle)
    return low / STEPS, cost(low)


def _budget(student: AutoStudent) -> tuple[str, float]:
    for name in ("parameters", "macs", "latency"):
        share = getattr(student, name)
        if share is not None:
            return name, share
    raise AssertionError("the contract fills in a budget")


def _cost(name: str, candidate: Candidate, original: Original) -> float:
    if name == "parameters":
        return candidate.parameters() / original.parameters
    network = candidate.network()
    if name == "macs":
        return module_macs(network, original.example) / max(1, _macs(original))
    rivals = {
        "original": functools.partial(_run, original.network, original.example),
        "student": functools.partial(_run, network, original.example),
    }
    taken = measure_in_turns(rivals, batch_size=1, threads=original.threads, budget_s=LATENCY_SECONDS)
    return taken["student"].median_s / taken["original"].median_s


def _macs(original: Original) -> int:
    return module_macs(original.network, original.example)


def _run(network: nn.Module, inputs: Inputs) -> None:
    with torch.inference_mode():
        network(*inputs)
