"""Runs in a process of its own, with a runtime and nothing else: `python fresh.py RUNTIME FILE INPUTS OUTPUTS BATCH`.

What is imported beyond the runtime and what it needs itself is refused, as if it were not installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FORBIDDEN = {
    "onnxruntime": ("torch", "onnx", "transformers", "safetensors", "compressed_tensors", "app", "worker"),
    "torch": ("onnx", "onnxruntime", "transformers", "compressed_tensors", "app", "worker"),
}


class Refuses(MetaPathFinder):
    """Finds none of the modules that are not there."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Raises ModuleNotFoundError for those."""
        if fullname.partition(".")[0] in self._names:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


def answers(runtime: str, file: Path, inputs: Any, folder: Path, batch: int) -> Any:
    """What a fresh process gives for the inputs, in batches; the arrays lie in the folder."""
    import numpy as np

    np.savez(folder / "inputs.npz", input=inputs)
    files = [str(file), str(folder / "inputs.npz"), str(folder / "outputs.npy")]
    command = [sys.executable, "-I", __file__, runtime, *files, str(batch)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "outputs.npy")


def main(runtime: str, file: str, inputs: str, outputs: str, batch: str) -> None:
    """Writes what the file gives for the inputs, in batches: the ranges of dynamic int8 are those of a batch."""
    sys.meta_path.insert(0, Refuses(FORBIDDEN[runtime]))
    import numpy as np

    given = np.load(inputs)["input"]
    parts = [given[start : start + int(batch)] for start in range(0, len(given), int(batch))]
    if runtime == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        found = [session.run(None, {session.get_inputs()[0].name: part})[0] for part in parts]
    else:
        from safetensors.torch import load_file

        state = load_file(file)
        found = [_lenet(state, part) for part in parts]
    np.save(outputs, np.concatenate(found))


def _lenet(state: Any, inputs: Any) -> Any:
    """LeNet-5 by hand, of the functions of torch alone."""
    import torch
    from torch.nn import functional

    with torch.no_grad():
        out = torch.from_numpy(inputs)
        for name, padding in (("0", 2), ("3", 0)):
            out = functional.conv2d(
                out, state[f"{name}.weight"].float(), state[f"{name}.bias"].float(), padding=padding
            )
            out = functional.max_pool2d(out.relu(), 2)
        out = out.flatten(1)
        for name in ("7", "9"):
            out = functional.linear(out, state[f"{name}.weight"].float(), state[f"{name}.bias"].float()).relu()
        return functional.linear(out, state["11.weight"].float(), state["11.bias"].float()).numpy()


if __name__ == "__main__":
    main(*sys.argv[1:])
