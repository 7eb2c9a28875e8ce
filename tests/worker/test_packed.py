"""Packed artifacts as tensors of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.contract.packed import Damaged
from tests.worker.helpers import mlp
from worker.packed import _DTYPES, load, packed


def written(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    path = folder / "model.tsr"
    path.write_bytes(packed(tensors)[0])
    return path


@pytest.mark.parametrize("dtype", list(_DTYPES))
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn((12, 5), generator=random).mul(20).abs().to(dtype)
    found = load(written({"w": values, "t": values.T, "one": values[0, 0]}, tmp_path))
    for name, tensor in (("w", values), ("t", values.T), ("one", values[0, 0])):
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        bits = [one.reshape(-1).view(torch.uint8) for one in (found[name], tensor)]
        assert torch.equal(*bits)


def test_two_lines_and_nothing_of_the_worker_but_torch(tmp_path: Path) -> None:
    module = mlp()
    path = written(module.state_dict(), tmp_path)
    code = (
        "from worker.packed import load; import sys\n"
        f"state = load({str(path)!r})\n"
        "print(sorted(state), [name for name in ('onnx', 'onnxruntime', 'transformers', 'safetensors', 'fastapi', "
        "'sqlalchemy', 'torchmetrics', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{sorted(module.state_dict())} []"
    again = mlp(seed=1)
    again.load_state_dict(load(path))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_what_is_loaded_can_be_trained_on(tmp_path: Path) -> None:
    found = load(written({"w": torch.zeros(3, 3)}, tmp_path))["w"]
    found += 1
    assert found.sum() == 9


def test_a_damaged_file_and_one_that_holds_too_much_are_refused(tmp_path: Path) -> None:
    path = written({"w": torch.ones(100, 100)}, tmp_path)
    with pytest.raises(Damaged, match="39,999 are allowed"):
        load(path, max_bytes=39_999)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged, match="digest"):
        load(path)


def test_what_cannot_be_held_is_named() -> None:
    with pytest.raises(ValueError, match=r"w is torch.complex64"):
        packed({"w": torch.zeros(2, dtype=torch.complex64)})
