"""A module of a loaded program as a program again: readable by plain `torch.export.load`, and called as before."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from app.contract.architecture import MAX_INPUT_ELEMENTS
from app.contract.errors import ExportFailed, ModelRejected
from worker.data.batch import Inputs
from worker.export.quiet import quiet
from worker.loading.program_casts import store_narrow
from worker.loading.program_graph import NARROW, TensorInput
from worker.loading.program_module import Program
from worker.loading.program_nodes import set_argument
from worker.model import EXAMPLE_LENGTH, Dtypes, Save
from worker.vetting.boundary import first_line
from worker.vetting.treespec import Call

FILENAME = "model.pt2"
# Any batch but 1, which an export would take for a constant.
_EXPORT_BATCH = 2
# What torch notes on each node for its own debugging: paths of this machine, and half of a small file.
_NOTES = ("stack_trace", "from_node", "torch_fn", "source_fn_stack")


def example_length(inputs: tuple[TensorInput, ...]) -> int:
    """The length of the first open dimension in the uploaded export, which the program is known to run on.

    Raises ModelRejected where a sample of that length, or of twice that, would have too many elements.
    """
    pairs = [pair for tensor in inputs for pair in zip(tensor.shape[1:], tensor.example[1:], strict=True)]
    length = next((example for size, example in pairs if size is None and example > 1), EXAMPLE_LENGTH)
    for tensor in inputs:
        elements = math.prod(2 * length if size is None else size for size in tensor.shape[1:])
        if elements > MAX_INPUT_ELEMENTS:
            raise ModelRejected(
                f"The program's input {tensor.name!r} has {elements} elements a sample; at most {MAX_INPUT_ELEMENTS} "
                "are taken."
            )
    return length


def saver(inputs: tuple[TensorInput, ...], call: Call, stored: dict[str, torch.dtype], casts: Dtypes) -> Save:
    """`Model.save`: writes a program that is called as the uploaded one was, in the dtypes that came.

    What is in `casts` is stored so and widened where the program uses it, which computes as before. The function
    raises ExportFailed where torch cannot trace the module with the open dimensions kept open.
    """
    length = example_length(inputs)

    def save(module: nn.Module, folder: Path) -> Path:
        assert isinstance(module, Program)
        target = folder / FILENAME
        program = _called(_as_stored(module, stored), call)
        example = _example(inputs, length)
        positional = example[: call.positional]
        named = dict(zip(call.keywords, example[call.positional :], strict=True))
        shapes = {tensor.name: _open(tensor) for tensor in inputs}
        try:
            with quiet():
                exported = torch.export.export(program, positional, named, dynamic_shapes=shapes)
                store_narrow(exported, casts)
                strip_notes(exported)
                torch.export.save(exported, target)
        except Exception as failure:  # the exporter raises errors of every class, with a page of advice
            raise ExportFailed(f"torch could not export the program again: {first_line(failure)}") from failure
        return target

    return save


def _called(program: Program, call: Call) -> nn.Module:
    """The program's modules under a plain module, whose output comes in what the uploaded program's came in.

    torch.export would interpret a graph module node by node, and make a dictionary in its output one of fx's own type.
    """
    root = program.tree()
    compiled = type(program).forward

    @functools.wraps(program.forward)  # for the names of the arguments
    def forward(*args: Tensor, **kwargs: Tensor) -> Any:
        logits = compiled(root, *args, **kwargs)
        match call.wrapped:
            case "tuple":
                return (logits,)
            case "list":
                return [logits]
            case "dict":
                return {call.key: logits}
        return logits

    root.forward = forward
    return root.eval()


def _as_stored(program: Program, stored: dict[str, torch.dtype]) -> Program:
    """Computing in the dtypes of the file again, where it was widened to float32."""
    tensors = {**dict(program.named_parameters()), **dict(program.named_buffers())}
    narrowed = {name: dtype for name, dtype in stored.items() if name in tensors and tensors[name].dtype != dtype}
    if not narrowed:
        return program
    program = copy.deepcopy(program)
    for node in program.graph.nodes:
        for name, dtype in node.meta.get(NARROW, {}).items():
            set_argument(node, name, dtype)
    program.recompile()
    with torch.no_grad():
        for name, tensor in (*program.named_parameters(), *program.named_buffers()):
            if name in narrowed:
                tensor.data = tensor.data.to(narrowed[name])
    return program


def _example(inputs: tuple[TensorInput, ...], length: int) -> Inputs:
    """Ones, which are valid ids and masks; tracing does not look at values."""
    return tuple(
        torch.ones(
            (_EXPORT_BATCH, *(length if size is None else size for size in tensor.shape[1:])),
            dtype=getattr(torch, tensor.dtype),
        )
        for tensor in inputs
    )


def _open(tensor: TensorInput) -> dict[int, Any]:
    return {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(tensor.shape) if size is None}


def strip_notes(exported: torch.export.ExportedProgram) -> None:
    """Takes out notes for debugging and the example inputs, which torch would pickle into the file."""
    for module in exported.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                for note in _NOTES:
                    node.meta.pop(note, None)
    exported.example_inputs = None
