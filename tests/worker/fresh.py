"""Runs in a process of its own, with a runtime and nothing else: `python fresh.py RUNTIME FILE INPUTS OUTPUTS BATCH`.

What lies beyond the runtime and what it needs itself is not found, as if it were not installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

FORBIDDEN = {
    "onnxruntime": ("torch", "onnx", "transformers", "safetensors", "compressed_tensors", "app", "worker"),
    "torch": ("onnx", "onnxruntime", "transformers", "compressed_tensors", "app", "worker"),
    "program": ("onnx", "onnxruntime", "transformers", "safetensors", "compressed_tensors", "app", "worker"),
}


class Without:
    """A finder that finds some modules no more, whether they are to be imported or only asked for."""

    def __init__(self, finder: Any, names: tuple[str, ...]) -> None:
        self._finder, self._names = finder, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None for those."""
        if fullname.partition(".")[0] in self._names:
            return None
        found: ModuleSpec | None = self._finder.find_spec(fullname, path, target)
        return found


def leave(runtime: str) -> None:
    """From here on a process finds what the runtime needs, and nothing else."""
    hidden = FORBIDDEN[runtime]
    sys.meta_path[:] = [Without(finder, hidden) for finder in sys.meta_path]  # type: ignore[misc]
    assert not any(map(find_spec, hidden))


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
    leave(runtime)
    import numpy as np

    given = np.load(inputs)["input"]
    parts = [given[start : start + int(batch)] for start in range(0, len(given), int(batch))]
    if runtime == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        found = [session.run(None, {session.get_inputs()[0].name: part})[0] for part in parts]
    elif runtime == "program":
        found = _program(file, parts)
    else:
        from safetensors.torch import load_file

        state = load_file(file)
        found = [_lenet(state, part) for part in parts]
    np.save(outputs, np.concatenate(found))


def _program(file: str, parts: list[Any]) -> list[Any]:
    """What docs/http.md tells whoever has downloaded one."""
    import torch
    import torch.ao.quantization.fx._decomposed

    program = torch.export.load(file).module()
    with torch.no_grad():
        return [program(torch.from_numpy(part)).numpy() for part in parts]


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
