"""Artifacts back to Models: what may be uploaded, and what only an exporter writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn

from app.contract.architecture import model_spec
from app.contract.errors import ModelRejected
from worker.loading.loader import load_model
from worker.model import Model

Reader = Literal["upload", "compressed-tensors", "program"]


def load_delivered(reader: Reader, path: Path, filename: str, spec: dict[str, Any], scratch: Path) -> Model:
    """Reads a file that a job wrote, or as `load_model` does one that was uploaded."""
    if reader == "upload":
        return load_model(path, filename, spec, scratch)
    # Only here, since transformers takes seconds to import.
    from worker.loading.huggingface import load_compressed

    return load_compressed(path, model_spec(spec, ModelRejected), scratch)


def load_module(reader: Reader, path: Path, filename: str, spec: dict[str, Any], scratch: Path) -> nn.Module:
    """What computes: the module of `load_delivered`, or a program as torch loads it, which is no Model."""
    if reader == "program":
        from worker.export.program import open_program

        return open_program(path).module()
    return load_delivered(reader, path, filename, spec, scratch).module.eval()
