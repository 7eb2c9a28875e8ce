"""`tersor unpack` as a person uses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from app.cli import app
from app.contract.errors import TersorError
from app.contract.packed import Stored, pack
from tests.contract.packed.made import networks

GOLDEN = Path(__file__).parents[1] / "contract" / "packed" / "golden" / "version-1.tsr"


def test_the_tensors_are_in_a_safetensors_file(tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    done = CliRunner().invoke(app, ["unpack", str(GOLDEN), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "17 tensors" in done.output
    with safe_open(out, framework="pt") as file:
        for name, stored in networks().items():
            tensor = file.get_tensor(name)
            assert tuple(tensor.shape) == stored.shape
            assert bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) == stored.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_folders_are_made_and_others_may_read(tmp_path: Path) -> None:
    out = tmp_path / "one" / "two" / "model.safetensors"
    assert CliRunner().invoke(app, ["unpack", str(GOLDEN), "-o", str(out)]).exit_code == 0
    (plain := tmp_path / "plain").touch()
    assert out.stat().st_mode == plain.stat().st_mode


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["unpack", str(GOLDEN), "-o", str(tmp_path)])
    assert isinstance(done.exception, TersorError)
    assert f"{tmp_path} cannot be written: Is a directory." in str(done.exception)


def test_a_damaged_file_leaves_nothing_behind(tmp_path: Path) -> None:
    damaged, out = tmp_path / "damaged.tsr", tmp_path / "out.safetensors"
    damaged.write_bytes(GOLDEN.read_bytes()[:-3])
    out.write_bytes(b"what was there")
    done = CliRunner().invoke(app, ["unpack", str(damaged), "-o", str(out)])
    assert isinstance(done.exception, TersorError)
    assert "damaged.tsr: The file's digest is not that of its bytes" in str(done.exception)
    assert out.read_bytes() == b"what was there"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_limit_is_a_limit(tmp_path: Path) -> None:
    large = tmp_path / "large.tsr"
    large.write_bytes(pack({"w": Stored.of(np.zeros((1000, 1000), np.float32))})[0])
    out = tmp_path / "out.safetensors"
    done = CliRunner().invoke(app, ["unpack", str(large), "-o", str(out), "--max-bytes", "1000"])
    assert "4,000,000 bytes of tensors, and 1,000 are allowed" in str(done.exception)
    assert not out.exists()


@pytest.mark.parametrize("arguments", [["nowhere.tsr", "-o", "x"], [str(GOLDEN)]])
def test_what_is_missing_is_said(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["unpack", *arguments]).exit_code == 2
