"""A checkpoint as a file: tensors as safetensors, everything else as JSON in its header. Nothing in it is ever run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.contract.errors import ModelRejected
from worker.training.states import State, Unusable
from worker.vetting.safetensors import read_header

FORMAT = 1  # one that differs was written by another version of this product
META = "tersor"


def write(path: Path, parts: Mapping[str, State]) -> None:
    """Writes the parts; the file is there whole, or as it was before."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for part, state in parts.items():
        values[part] = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{part}/{name}"] = _own(value)
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, metadata={META: json.dumps({"format": FORMAT, "parts": values})})
    os.replace(partial, path)


def read(path: Path) -> dict[str, State]:
    """The parts again. Raises Unusable for a file that is damaged, or of another version."""
    try:
        header = read_header(path, ModelRejected)
        said = json.loads(header.metadata[META])
        if said["format"] != FORMAT:
            raise Unusable(f"it has the format {said['format']!r}, and this version reads {FORMAT}")
        parts: dict[str, State] = {name: dict(values) for name, values in said["parts"].items()}
        for name, tensor in load_file(path).items():
            part, _, key = name.partition("/")
            parts[part][key] = tensor
    except (OSError, ModelRejected, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Unusable(f"it cannot be read ({type(error).__name__}: {error})") from error
    return parts


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, dense, and with memory of its own: the library refuses to guess what views are meant to be."""
    plain = tensor.detach().cpu().contiguous()
    shared = plain.untyped_storage().nbytes() != plain.numel() * plain.element_size()
    return plain.clone() if shared else plain
