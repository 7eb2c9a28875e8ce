"""Upload bytes to a Model: which loader, by content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.contract.architecture import ModelSpec, model_spec
from app.contract.errors import ModelRejected
from worker.loading.advice import advice
from worker.loading.architecture import load_architecture
from worker.loading.onnx import load_onnx, load_onnx_archive
from worker.loading.program import load_program
from worker.loading.weights import Weights, read_safetensors, read_torch
from worker.model import Model
from worker.vetting.archive import open_archive
from worker.vetting.boundary import refusing
from worker.vetting.sniff import refuse, sniff

_READERS = {"safetensors": read_safetensors, "torch-zip": read_torch, "legacy-torch": read_torch}


def load_model(path: Path, filename: str, spec: dict[str, Any], scratch: Path) -> Model:
    """Reads an uploaded model; what is unpacked goes under `scratch` and is needed as long as the model is.

    Raises ModelRejected with a sentence that says what came and what to send instead, whatever the file provokes,
    and runs nothing that the file holds. A full or failing disk stays an OSError.
    """
    with refusing(ModelRejected, filename, "a model"):
        parsed = model_spec(spec, ModelRejected)
        kind = sniff(path)
        if kind in _READERS:
            return _load_weights(_READERS[kind], path, parsed, scratch)
        if kind == "onnx":
            return load_onnx(path, parsed)
        if kind in ("zip", "tar"):
            return _load_folder(path, parsed, scratch)
        if kind == "pt2":
            return load_program(path, parsed, scratch)
        raise refuse(kind, filename, advice(kind), ModelRejected)


def _load_weights(read: Callable[[Path], Weights], path: Path, spec: ModelSpec, scratch: Path) -> Model:
    if spec.config is not None:
        # Only here, since transformers takes seconds to import.
        from worker.loading.configured import load_configured

        return load_configured(read(path), spec, scratch)
    _need_architecture(spec)
    return load_architecture(spec, read(path))


def _load_folder(path: Path, spec: ModelSpec, scratch: Path) -> Model:
    if _holds_onnx(path, scratch):
        return load_onnx_archive(path, spec, scratch)
    for field in ("architecture", "config"):
        if getattr(spec, field) is not None:
            raise ModelRejected(
                f"The file is an archive and the spec has {field!r}: upload the weights alone, or leave it out.",
                pointer=f"/{field}",
            )
    # Only here, since transformers takes seconds to import.
    from worker.loading.huggingface import load_huggingface

    return load_huggingface(path, spec, scratch)


def _holds_onnx(path: Path, scratch: Path) -> bool:
    """Whether an archive holds an ONNX graph, and no weights that transformers would read."""
    archive = open_archive(path, scratch, ModelRejected)
    suffixes = {name.rpartition(".")[2] for name in archive.members}
    archive.close()
    return "onnx" in suffixes and "safetensors" not in suffixes


def _need_architecture(spec: ModelSpec) -> None:
    if spec.architecture is None:
        raise ModelRejected(
            "Weights alone say nothing of the layers between them: give spec.architecture, spec.input and spec.task, "
            "or spec.config with the config.json of transformers, or upload a zip of a Hugging Face folder.",
            pointer="/architecture",
        )
