"""Programs of torch.export as clients upload them, and the means to spoil them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worker.loading import load_model
from worker.model import Model

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
OPEN = torch.export.Dim.DYNAMIC


class ConvNet(nn.Module):
    """Convolutions, BatchNorm, a residual, dropout, an in-place activation and a constant, for [batch, 1, 8, 8]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(8 * 16, 10)
        self.register_buffer("scale", torch.full((10,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = nn.functional.max_pool2d(self.act(self.block(x) + x), 2)
        logits: Tensor = self.head(self.drop(x.flatten(1))) * self.scale + torch.tensor([1.0])
        return logits


def image(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def exported(
    module: nn.Module, *inputs: Tensor, axes: tuple[int, ...] = (0,), decompose: bool = False, **named: Tensor
) -> bytes:
    """The program of a module whose inputs may vary along `axes`."""
    shapes: Any = tuple(dict.fromkeys(axes, OPEN) for _ in inputs) or {
        name: dict.fromkeys(axes, OPEN) for name in named
    }
    program = torch.export.export(module, inputs, named, dynamic_shapes=shapes)
    return saved(program.run_decompositions() if decompose else program)


def saved(program: torch.export.ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def unpacked(content: bytes) -> dict[str, bytes]:
    """The files of a program by name, without the top folder."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def packed(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def edited(content: bytes, file: str, change: Callable[[Any], Any]) -> bytes:
    """The program with one of its JSON files changed, in place or by what `change` gives."""
    files = unpacked(content)
    tree = json.loads(files[file])
    files[file] = json.dumps(change(tree) or tree).encode()
    return packed(files)


def objects(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON tree."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield node
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)


def load(content: bytes, folder: Path, **spec: Any) -> Model:
    """The Model of a program, an image classifier where nothing else is said."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "upload.pt2"
    path.write_bytes(content)
    return load_model(path, path.name, {"task": "image-classification"} | spec, folder)


def outputs(module: Any, *inputs: Tensor) -> Tensor:
    """What a module in eval mode gives, out of a dictionary too."""
    with torch.no_grad():
        found = module(*inputs)
    result: Tensor = found if isinstance(found, Tensor) else found["logits"]
    return result
