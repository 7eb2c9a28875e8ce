"""Batch sizes by what they cost: samples a second, and memory."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from app.contract.training import Settled
from worker.context import Context
from worker.training.finding.rehearsal import brief, rehearsal
from worker.training.loop import train

SMALLEST = 8
# An epoch of fewer steps than this learns too little from its samples.
LEAST_STEPS = 16
WARM_UP, TIMED = 1, 3  # steps
GAIN = 1.05  # of samples a second, for which a batch is worth doubling
# Of the memory that the job may take: what it needs later, to export and to measure, is not trained then.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Load:
    """What a batch size costs."""

    batch_size: int
    samples_per_second: float
    peak_bytes: int

    def row(self) -> dict[str, float | int | str | None]:
        """For a report."""
        return {
            "batch_size": self.batch_size,
            "samples_per_second": round(self.samples_per_second, 1),
            "peak_bytes": self.peak_bytes,
        }


def loads(context: Context, training: Settled, samples: int) -> list[Load]:
    """Batch sizes in powers of two, smallest first, as far as they fit the memory and `samples` samples make steps.

    It stops doubling where two doublings in a row gained nothing.
    """
    found: list[Load] = []
    idle = 0
    for size in _sizes(samples):
        if found and not _fits(found, size, context.memory_bytes):
            break
        try:
            load = _load(context, training, size)
        except torch.OutOfMemoryError:
            break
        best = max((one.samples_per_second for one in found), default=0.0)
        idle = 0 if load.samples_per_second > GAIN * best else idle + 1
        found.append(load)
        if idle == 2:
            break
    return found


def fastest(found: list[Load]) -> Load:
    """The smallest batch that comes within 5 % of the most samples a second: smaller batches learn more an epoch."""
    best = max(load.samples_per_second for load in found)
    return next(load for load in found if load.samples_per_second * GAIN >= best)


def _sizes(samples: int) -> Iterator[int]:
    size = min(SMALLEST, max(1, samples))
    while size == SMALLEST or size * LEAST_STEPS <= samples:
        yield size
        size *= 2


def _fits(found: list[Load], size: int, memory: int | None) -> bool:
    """Whether a batch is expected to fit, by the two before it: memory grows in a straight line."""
    if memory is None:
        return True
    last = found[-1]
    slope = 0.0
    if len(found) > 1:
        slope = (last.peak_bytes - found[-2].peak_bytes) / (last.batch_size - found[-2].batch_size)
    return last.peak_bytes + slope * (size - last.batch_size) <= MEMORY_SHARE * memory


def _load(context: Context, training: Settled, size: int) -> Load:
    """A few steps of this size on a copy, each timed; the median counts."""
    ticks: list[float] = []
    _reset_peak(context.device)

    def tick(step: int, total: int) -> bool:
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)
        ticks.append(time.perf_counter())
        return True

    steps = WARM_UP + TIMED + 1  # the last one ends untimed
    short = brief(training.settled(batch_size=size), steps)
    train(rehearsal(context), short, tick)
    seconds = statistics.median(b - a for a, b in zip(ticks[WARM_UP:], ticks[WARM_UP + 1 :], strict=False))
    return Load(size, size / seconds, _peak(context.device))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    """Bytes: of the device since the last reset, or of this process since it began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
