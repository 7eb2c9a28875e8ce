from __future__ import annotations

import gc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.evaluation.latency import (
    FEWEST_RUNS,
    MAX_RUNS,
    MIN_RUNS,
    RUNS_A_TURN,
    measure_in_turns,
    planned_rounds,
    quantile,
    summarize,
)


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=60), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_quantile_is_numpys(values: list[float], share: float) -> None:
    assert quantile(sorted(values), share) == pytest.approx(float(np.quantile(values, share)))


def test_summary_states_how_it_was_taken() -> None:
    summary = summarize([0.3, 0.1, 0.2], batch_size=1, threads=2)
    assert summary.median_s == 0.2
    assert summary.p95_s == pytest.approx(0.29)
    assert (summary.batch_size, summary.runs, summary.threads) == (1, 3, 2)


@pytest.mark.parametrize(
    ("round_s", "rounds"),
    [(0.0, MAX_RUNS), (1e-4, MAX_RUNS), (0.02, 75), (0.5, MIN_RUNS), (6.0, 10), (1000.0, FEWEST_RUNS)],
)
def test_rounds_fit_the_budget(round_s: float, rounds: int) -> None:
    assert planned_rounds(round_s, budget_s=1.5) == rounds


def test_rivals_run_in_turns_without_the_collector() -> None:
    calls: list[str] = []
    collector: set[bool] = set()

    def rival(name: str) -> None:
        calls.append(name)
        collector.add(gc.isenabled())

    taken = measure_in_turns({n: lambda n=n: rival(n) for n in "ab"}, batch_size=1, threads=1, budget_s=0.001)
    turns = taken["a"].runs // RUNS_A_TURN
    assert turns > 1
    turn = 1 + RUNS_A_TURN  # the first run of a turn is not timed
    blocks = [calls[i : i + turn] for i in range(len(calls) - 2 * turns * turn, len(calls), turn)]
    assert all(len(set(block)) == 1 for block in blocks)
    rounds = [(first[0], second[0]) for first, second in zip(blocks[::2], blocks[1::2], strict=True)]
    assert set(rounds) == {("a", "b"), ("b", "a")}  # each round both, in either order
    assert taken["a"].runs == taken["b"].runs == turns * RUNS_A_TURN
    assert gc.isenabled()
    assert False in collector


def test_the_collector_comes_back_after_an_error() -> None:
    turns = iter([None] * 8)

    def breaks() -> None:
        next(turns)

    with pytest.raises(StopIteration):
        measure_in_turns({"a": breaks}, batch_size=1, threads=1)
    assert gc.isenabled()
