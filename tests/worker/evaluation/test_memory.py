from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from app.contract.errors import ArtifactUnverified
from tests.worker.jobs import LENET_LAYERS
from tests.worker.nets import lenet
from worker.evaluation.memory import Probe, peak_memories

MIB = 1 << 20


def probe(path: Path, folder: Path) -> Probe:
    np.savez(folder / "inputs.npz", np.zeros((1, 1, 28, 28), dtype=np.float32))
    return Probe(str(path), path.name, {}, str(folder / "inputs.npz"), str(folder), 1)


ALLOCATES = """
import numpy as np
from worker.evaluation.memory import _in_a_fork, measure

def load():
    np.ones(64 << 20, dtype=np.uint8)  # freed at once
    return lambda: None

np.ones(128 << 20, dtype=np.uint8)  # a peak of the parent's own, which is not the fork's
print(_in_a_fork(lambda: str(measure(load))))
"""


def test_peak_sees_what_was_allocated_and_given_back() -> None:
    """In a process of its own, whose allocator nobody has told to keep what was freed."""
    done = subprocess.run([sys.executable, "-c", ALLOCATES], capture_output=True, text=True, check=True)
    assert 60 * MIB < int(done.stdout) < 90 * MIB


def test_a_small_network_takes_little_above_the_runtime(lenet_float: Path, tmp_path: Path) -> None:
    twice = [probe(lenet_float, tmp_path), probe(lenet_float, tmp_path)]
    first, second = peak_memories("onnxruntime", twice)
    assert 0 < first < 32 * MIB
    assert abs(first - second) < 8 * MIB  # the second is not charged for the first, nor spared by it


def test_torch_is_not_charged_to_an_onnx_file() -> None:
    code = "import sys, worker.evaluation.memory; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_file_that_does_not_load_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ArtifactUnverified, match=r"model\.onnx did not run in a fresh process"):
        peak_memories("onnxruntime", [probe(broken, tmp_path)])


def test_a_torch_file_is_not_charged_for_what_torch_imports_late(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(lenet().state_dict(), path)
    spec = {
        "task": "image-classification",
        "architecture": {"layers": LENET_LAYERS},
        "input": {"shape": [1, 28, 28], "dtype": "float32"},
    }
    (found,) = peak_memories("torch", [dataclasses.replace(probe(path, tmp_path), spec=spec)])
    assert 61_706 * 4 <= found < 48 * MIB
