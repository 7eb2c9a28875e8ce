"""A torch module to an exported program (`.pt2`), which torch alone loads: `torch.export.load(path).module()`."""

from __future__ import annotations

import functools
import inspect
import keyword
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Registers torch.ops.quantized_decomposed, without which a program of integers does not load.
import torch.ao.quantization.fx._decomposed
from torch import nn
from torch.export import Dim, ExportedProgram

from app.contract.errors import ExportFailed
from worker.data.batch import Inputs
from worker.export.onnx import EXAMPLE_BATCH, open_axes
from worker.export.quiet import quiet
from worker.loading.heads import delivering
from worker.loading.program_save import strip_notes
from worker.model import Model
from worker.vetting.boundary import first_line, ran_out_of_memory

FILENAME = "program.pt2"  # beside model.pt2, which is the native file of a program


def export_program(module: nn.Module, model: Model, path: Path) -> Path:
    """Writes `module`, which has the structure of `model.module` and no parametrizations, in floating point.

    It takes the inputs by position, in the order of the model's facts; the batch and the dimensions that the facts
    leave open stay open. It gives what the upload's own file gives. Raises ExportFailed where torch cannot trace the
    module so.
    """
    with delivering(module):
        return save_program(module.cpu().eval(), model, path)


def save_program(module: nn.Module, model: Model, path: Path) -> Path:
    """Writes a module that takes the model's inputs and gives one tensor."""
    inputs = model.facts.inputs
    example: Inputs = tuple(tensor.clone() for tensor in model.example(batch=EXAMPLE_BATCH))
    names = input_names([tensor.name for tensor in inputs])
    shapes = {name: dict.fromkeys(open_axes(own.shape), Dim.DYNAMIC) for name, own in zip(names, inputs, strict=True)}
    try:
        with quiet(), torch.no_grad(), _taking(module, names):
            program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
            strip_notes(program)
            torch.export.save(program, path)
    except Exception as failure:  # the exporter raises errors of every class, with a page of advice
        if ran_out_of_memory(failure):
            raise
        raise ExportFailed(
            f"torch could not export the model as a program: {first_line(failure)} Export native or onnx instead.",
            pointer="/export",
        ) from failure
    return path


def open_program(path: Path) -> ExportedProgram:
    """A program that this service wrote, by torch's own reader, as whoever downloads it loads it.

    Never for what was uploaded: the reader runs code from a hostile file (decision 11).
    """
    with quiet():
        return torch.export.load(path)


def input_names(names: Sequence[str]) -> list[str]:
    """Names of inputs as names of arguments, each another."""
    found: list[str] = []
    for place, name in enumerate(names):
        valid = re.sub(r"\W", "_", name, flags=re.ASCII)
        usable = valid.isidentifier() and not keyword.iskeyword(valid) and valid != "self" and valid not in found
        found.append(valid if usable else f"input_{place}")
    return found


@contextmanager
def _taking(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the block forward's arguments have these names, whatever its own signature."""
    own = module.forward
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, *kwargs.values())

    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before
