"""Every figure of the report, taken on files that were loaded again, all of them in the same run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from app.contract.facts import Task
from app.contract.report import Latency, Measurement, Metric
from app.contract.tasks import HIGHER_IS_BETTER, TASKS, evaluation_split
from worker.data.batch import Inputs
from worker.data.feed import Feed
from worker.evaluation.artifact import Reloaded
from worker.evaluation.latency import measure_in_turns
from worker.evaluation.memory import peak_memories


@dataclass(frozen=True)
class Bench:
    """What all files are measured with: the same sample, data, task and threads."""

    sample: Inputs
    feed: Feed | None
    task: Task
    scratch: Path
    threads: int


def latencies(files: Mapping[str, Reloaded], bench: Bench) -> dict[str, Latency]:
    """Latency of one sample for each file, in turns."""
    rivals = {name: functools.partial(file, bench.sample) for name, file in files.items()}
    return measure_in_turns(rivals, batch_size=1, threads=bench.threads)


def memories(files: Mapping[str, Reloaded], bench: Bench) -> dict[str, int]:
    """Peak memory of each file, in bytes above its bare runtime; one fresh process a runtime."""
    found: dict[str, int] = {}
    for runtime in dict.fromkeys(file.runtime for file in files.values()):
        chosen = {
            name: file.probe(bench.sample, bench.scratch) for name, file in files.items() if file.runtime == runtime
        }
        found |= dict(zip(chosen, peak_memories(runtime, list(chosen.values())), strict=True))
    return found


def measure(file: Reloaded, latency: Latency, peak_memory: int, bench: Bench) -> Measurement:
    """One file's figures; `latency` was taken in turns with its rivals, `peak_memory` in a fresh process."""
    parameters, nonzero = file.parameters()
    first, *others = metrics(file, bench.feed, bench.task) or (None,)
    return Measurement(
        runtime=file.runtime,
        size_bytes=file.path.stat().st_size,
        parameters=parameters,
        nonzero_parameters=nonzero,
        macs=file.macs(bench.sample),
        metric=first,
        other_metrics=tuple(one for one in others if one is not None),
        latency=latency,
        peak_memory_bytes=peak_memory,
        layers=file.layers(),
    )


def metrics(file: Reloaded, feed: Feed | None, task: Task) -> tuple[Metric, ...]:
    """The task's metrics on the labelled test split, else on validation, its own first; none where neither is there."""
    split = evaluation_split(feed.data.facts, task) if feed is not None else None
    if feed is None or split is None:
        return ()
    found = feed.scores(file, split)
    return tuple(
        Metric(name=name, value=value, higher_is_better=HIGHER_IS_BETTER[name], split=split, samples=found.samples)
        for name, value in ((TASKS[task].metric, found.value), *found.others.items())
    )
