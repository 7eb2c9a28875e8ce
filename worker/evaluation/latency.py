"""How long one batch takes, rivals measured in turns so that a noisy machine is noisy for all of them."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence

from app.contract.report import Latency

WARM_UP = 5  # runs until allocators, caches and thread pools have settled
MIN_RUNS = 30  # below that a 95th percentile is one or two outliers
MAX_RUNS = 200
BUDGET_S = 1.5  # for all rivals together, unless MIN_RUNS take longer
# A rival so slow that MIN_RUNS would take minutes gets fewer: the noise is small against such a run.
LONGEST_S = 60.0
FEWEST_RUNS = 5
# After a run the threads of a pool (ONNX Runtime's, OpenMP's) spin for a while in wait of more work. An idle gap before
# each turn lets those of the rival before go to sleep, so that they do not take this one's cores.
GAP_S = 0.005
# A gap also puts the rival's own threads to sleep, which costs more than a small network: each turn begins with a run
# that is not timed, and then times several.
RUNS_A_TURN = 5
# Where one run of every rival takes longer, waking threads is lost in it: a turn is a single run.
QUICK_ROUND_S = 0.2


def measure_in_turns(
    rivals: Mapping[str, Callable[[], object]], *, batch_size: int, threads: int, budget_s: float = BUDGET_S
) -> dict[str, Latency]:
    """The latency of each callable in a steady stream of requests, the callables taking turns in random order.

    A turn is an idle gap, a run that is not timed, and RUNS_A_TURN timed ones (one, without the lead-in, for slow
    rivals). `threads` and `batch_size` are stated in the result; the callables must already keep to them.
    """
    round_s = sum(_warm_up(call) for call in rivals.values())
    turn = RUNS_A_TURN if round_s < QUICK_ROUND_S else 1
    turns = math.ceil(planned_rounds(round_s, budget_s) / turn)
    times: dict[str, list[float]] = {name: [] for name in rivals}
    shuffled = random.Random(0)  # noqa: S311 - no secret: an order that gives no rival the same predecessor each time
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(turns):
            for name in shuffled.sample(list(rivals), len(rivals)):
                time.sleep(GAP_S)
                if turn > 1:
                    rivals[name]()
                times[name] += [_timed(rivals[name]) for _ in range(turn)]
    finally:
        if was_enabled:
            gc.enable()
    return {name: summarize(taken, batch_size=batch_size, threads=threads) for name, taken in times.items()}


def planned_rounds(round_s: float, budget_s: float) -> int:
    """How many runs of every rival fit: MIN_RUNS to MAX_RUNS, fewer only where MIN_RUNS take longer than LONGEST_S."""
    if round_s <= 0:
        return MAX_RUNS
    rounds = min(MAX_RUNS, max(MIN_RUNS, int(budget_s / round_s)))
    return max(FEWEST_RUNS, min(rounds, int(LONGEST_S / round_s)))


def summarize(seconds: Sequence[float], *, batch_size: int, threads: int) -> Latency:
    """Median and 95th percentile, interpolated linearly between the two nearest runs."""
    ordered = sorted(seconds)
    return Latency(
        median_s=quantile(ordered, 0.5),
        p95_s=quantile(ordered, 0.95),
        batch_size=batch_size,
        runs=len(ordered),
        threads=threads,
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the ascending values lie, by linear interpolation (as numpy's default)."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _warm_up(call: Callable[[], object]) -> float:
    """Seconds of the fastest warm-up run; a slow call is not run five times for that."""
    fastest = first = _timed(call)
    for _ in range(WARM_UP - 1 if first < 1.0 else 1):
        fastest = min(fastest, _timed(call))
    return fastest


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
