"""Calibration samples as a graph takes them: one batch at a time, never all in memory, and as often as is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from worker.data.batch import Batch

# Batches are what the activations of a calibration run are held for: small enough for a large network's activations.
CALIBRATION_BATCH = 16

Feed = dict[str, np.ndarray]
"""A batch by the names of a graph's inputs."""


class Samples:
    """The same `count` batches each time they are gone through."""

    def __init__(self, batches: Callable[[], Iterable[Batch]], names: Sequence[str], count: int) -> None:
        self._batches, self._names, self._count = batches, names, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Feed]:
        for batch in self._batches():
            yield {name: tensor.cpu().numpy() for name, tensor in zip(self._names, batch.inputs, strict=True)}
