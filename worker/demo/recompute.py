"""`python -m worker.demo.recompute FILE DATA`: loads an artifact in a fresh process and counts its right answers.

Nothing of Tersor takes part: ONNX files go to onnxruntime, safetensors into a LeNet-5 written by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def logits_onnx(path: Path, inputs: NDArray[Any]) -> NDArray[Any]:
    """Logits [n, 10] of an ONNX file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: inputs})
    return np.asarray(output)


def logits_safetensors(path: Path, inputs: NDArray[Any]) -> NDArray[Any]:
    """Logits [n, 10] of a state dict of LeNet-5."""
    import torch
    from safetensors.torch import load_file

    from worker.demo.train_lenet import lenet

    state = load_file(path)
    model = lenet([len(state[f"{layer}.bias"]) for layer in (0, 3, 7, 9)])  # units may have left it
    model.load_state_dict(state)
    with torch.inference_mode():
        return np.asarray(model.eval()(torch.from_numpy(inputs)))


def main(path: Path, data: Path) -> None:
    """Prints {"correct": …, "samples": …} for the test split."""
    with np.load(data) as arrays:
        inputs, targets = arrays["test_inputs"], arrays["test_targets"]
    logits = (logits_onnx if path.suffix == ".onnx" else logits_safetensors)(path, inputs)
    result = {"correct": int((logits.argmax(1) == targets).sum()), "samples": len(targets)}
    print(json.dumps(result))  # noqa: T201 - its output is its result


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
