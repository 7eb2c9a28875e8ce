"""The lines that a refusal gives make files that are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.worker.loading.files import linear_spec
from worker.loading import load_model
from worker.loading.advice import KERAS, ONNX, PYTORCH, TENSORFLOW, WEIGHTS, advice
from worker.vetting.pt2 import HOW_TO_EXPORT


def lines(text: str) -> str:
    """The code of an advice: all but its first line, which is a sentence."""
    return text.partition("\n")[2]


@pytest.mark.parametrize(
    ("text", "name", "spec"),
    [
        (HOW_TO_EXPORT, "model.pt2", {"task": "image-classification"}),
        (ONNX, "model.onnx", {"task": "image-classification"}),
        (WEIGHTS, "model.safetensors", linear_spec()),
    ],
)
def test_what_the_lines_write_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str, spec: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, example = nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 4)
    exec(lines(text), {"torch": torch, "model": model, "example": example})
    loaded = load_model(tmp_path / name, name, spec, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(example), model(example))


def test_each_kind_gets_its_own() -> None:
    assert advice("torchscript") == advice("pickle") == PYTORCH
    assert advice("hdf5") == advice("keras") == KERAS
    assert advice("tflite") == TENSORFLOW
    assert "torch.export.save" in PYTORCH
    assert "torch.onnx.export" in PYTORCH
    assert "save_file" in PYTORCH
    assert "spec.architecture" in advice("pdf")
