"""NNCF's quantizer on a file, for `benchmarks int8`: a script for an interpreter that has nncf and onnx.

SOURCE CALIBRATION.npz TARGET [transformer]; an array for each input, in their order.
"""

from __future__ import annotations

import sys

import nncf  # type: ignore[import-not-found]
import numpy as np
import onnx

BATCH = 16


def main(source: str, calibration: str, target: str, *kind: str) -> None:
    """Writes the quantized file."""
    model = onnx.load(source)
    arrays = np.load(calibration)
    names = [value.name for value in model.graph.input]
    count = len(arrays[arrays.files[0]])
    batches = [
        {name: arrays[own][start : start + BATCH] for name, own in zip(names, arrays.files, strict=True)}
        for start in range(0, count, BATCH)
    ]
    options = {"model_type": nncf.ModelType.TRANSFORMER} if kind else {}
    quantized = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches), **options)
    onnx.save(quantized, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
