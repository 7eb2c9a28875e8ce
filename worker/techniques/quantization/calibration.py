"""Calibration samples as ONNX Runtime's quantizer wants them: one batch at a time, never all in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from onnxruntime.quantization.calibrate import CalibrationDataReader

from worker.data.batch import Batch

# Batches are what the activations of a calibration run are held for: small enough for a large network's activations.
CALIBRATION_BATCH = 16


class StreamingReader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Hands out one batch at a time, by input name.

    ONNX Runtime's histogram methods keep the activations of all batches that it reads in one go; asked to read in
    strides of one (`set_range`), it folds every batch into the histograms before it reads the next.
    """

    def __init__(self, batches: Iterable[Batch], names: Sequence[str], count: int) -> None:
        self._batches: Iterator[Batch] = iter(batches)
        self._names = names
        self._count = count
        self._allowed = count

    def __len__(self) -> int:
        return self._count

    def set_range(self, start_index: int, end_index: int) -> None:
        """Allows the batches of the next stride; strides follow one another, so nothing has to be read twice."""
        self._allowed = end_index - start_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None at the end of the stride."""
        if self._allowed == 0:
            return None
        self._allowed -= 1
        batch = next(self._batches, None)
        if batch is None:
            return None
        return {name: tensor.cpu().numpy() for name, tensor in zip(self._names, batch.inputs, strict=True)}
