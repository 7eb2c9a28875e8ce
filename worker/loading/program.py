"""An exported program (`.pt2`) as a Model: any graph of plain torch operators, without its code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import fx, nn

from app.contract.architecture import ModelSpec
from app.contract.errors import ModelRejected
from app.contract.facts import ModelFacts, TensorFacts
from worker.loading.describe import check_finite, check_forward, layer_facts
from worker.loading.feeding.plain import accepted, encoder
from worker.loading.program_casts import take_casts
from worker.loading.program_check import check_sizes
from worker.loading.program_graph import ProgramGraph, TensorInput, build_graph
from worker.loading.program_module import Program, assemble
from worker.loading.program_nodes import operator_name
from worker.loading.program_rules import to_public_operators
from worker.loading.program_save import FILENAME, example_length, saver
from worker.loading.program_weights import dtype_of, narrow_dtypes, read_tensors
from worker.model import Dtypes, Model, Save
from worker.objectives.registry import plain_task
from worker.vetting.archive import open_archive
from worker.vetting.boundary import first_line
from worker.vetting.pt2 import HOW_TO_EXPORT, ProgramFile, read_program

_DTYPES = frozenset({"float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"})


def load_program(path: Path, spec: ModelSpec, scratch: Path) -> Model:
    """Reads a program whose output is what the spec's task asks for. Nothing runs but operators of an allow-list.

    Raises ModelRejected for everything that `worker.vetting.pt2` refuses, for a batch that cannot vary, for weights
    that are NaN, and for programs that change inputs or buffers of their own.
    """
    for field in ("architecture", "config"):
        if getattr(spec, field) is not None:
            raise ModelRejected(
                f"A program of torch.export brings its own layers: leave {field!r} out.", pointer=f"/{field}"
            )
    if spec.task is None:
        raise ModelRejected(
            'A program does not say what it is for: give spec.task, as in {"task": "image-classification"}.',
            pointer="/task",
        )
    task = plain_task(spec.task)
    module, graph, file, casts = _read(path, scratch)
    inputs = tuple(_facts(tensor) for tensor in graph.inputs)
    stored = _stored(file)
    computed = {name: dtype for name, dtype in stored.items() if name not in casts}
    facts = ModelFacts(
        format="pt2",
        task=spec.task,
        accepts=accepted(spec.task, inputs),
        inputs=inputs,
        classes=1,
        labels=spec.labels,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        layers=layer_facts(module),
        native_file=FILENAME,
    )

    def saving(asked: Dtypes) -> Save:
        return saver(graph.inputs, file.call, computed, {**casts, **asked})

    encode, length = encoder(inputs, _vocabularies(module)), example_length(graph.inputs)
    model = Model(module, facts, encode, saving({}), task, stored, length, saving=saving)
    model = replace(model, example_length=_runnable_length(model))
    classes = _check(model, None if spec.labels is None else len(spec.labels))
    return replace(model, facts=facts.model_copy(update={"classes": classes}))


def read_module(path: Path, scratch: Path) -> Program:
    """The network of a program that this service wrote, of inputs by position. Raises as `load_program` does."""
    return _read(path, scratch)[0]


def _stored(file: ProgramFile) -> dict[str, torch.dtype]:
    dtypes = {name: dtype_of(tensor) for name, tensor in {**file.constants, **file.weights}.items()}
    return {name: dtype for name, dtype in dtypes.items() if dtype.is_floating_point}


def _read(path: Path, scratch: Path) -> tuple[Program, ProgramGraph, ProgramFile, Dtypes]:
    """The last: the dtypes of weights that are widened where they are used."""
    archive = open_archive(path, scratch, ModelRejected)
    try:
        file = read_program(path, archive)
        narrow = narrow_dtypes(file)
        graph = build_graph(file, narrow)
        for tensor in graph.inputs:
            _check_input(tensor, narrow)
        tensors = read_tensors(file, narrow)
    finally:
        archive.close()
    if missing := next((name for name in graph.attributes if name not in tensors), None):
        raise ModelRejected(f"The program lacks the tensor {missing!r}: the file is damaged.")
    casts = take_casts(graph.graph, _stored(file))
    to_public_operators(graph.graph)
    module = assemble(graph.graph, tensors, graph.attributes)
    check_finite(dict(module.named_parameters()))
    return module.eval(), graph, file, casts


def _check_input(tensor: TensorInput, narrow: frozenset[torch.dtype]) -> None:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    if tensor.dtype not in _DTYPES or (dtype.is_floating_point and dtype != torch.float32 and dtype not in narrow):
        raise ModelRejected(
            f"The program's input {tensor.name!r} is {tensor.dtype}: export it with inputs of float32 or of integers."
        )
    if not tensor.shape or tensor.shape[0] is not None:
        size = tensor.shape[0] if tensor.shape else "no dimension at all"
        raise ModelRejected(
            f"The program's input {tensor.name!r} has a fixed batch ({size}), and training and measuring take batches "
            f"of many sizes. {HOW_TO_EXPORT}"
        )


def _facts(tensor: TensorInput) -> TensorFacts:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return TensorFacts(
        name=tensor.name, shape=tensor.shape[1:], dtype="float32" if dtype.is_floating_point else tensor.dtype
    )


def _runnable_length(model: Model) -> int:
    """A length that the program runs on, and on half of it. Raises ModelRejected for a program that runs on none."""
    assert isinstance(model.module, Program)
    length = model.example_length
    check_sizes(model.module, model.example(2))
    try:
        check_sizes(model.module, model.example(2, length=max(1, length // 2)))
    except ModelRejected:  # a shortest length, as where convolutions follow each other
        length *= 2
        check_sizes(model.module, model.example(2, length=length))
    return length


def _vocabularies(module: Program) -> dict[str, int]:
    """How many ids are known to the embedding that takes an input as it comes."""
    found: dict[str, int] = {}
    for node in module.graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        while isinstance(source, fx.Node) and operator_name(source) in ("to", "_to_copy", "clone", "contiguous"):
            source = source.args[0]
        if isinstance(source, fx.Node) and source.op == "placeholder":
            layer = module.get_submodule(str(node.target))
            if isinstance(layer, nn.Embedding):
                found[str(source.target)] = min(layer.num_embeddings, found.get(str(source.target), 1 << 62))
    return found


def _check(model: Model, labels: int | None) -> int:
    """The number of classes. What the program computes with must be as it was when it has run."""
    two, one = model.example(2), model.example(1)
    watched = {**dict(model.module.named_buffers()), **dict(model.module.named_parameters())}
    watched |= {tensor.name: value for tensor, value in zip(model.facts.inputs, two, strict=True)}
    before = {name: tensor._version for name, tensor in watched.items()}
    try:
        classes = check_forward(model.module, model.facts.task, two, one, labels)
    except ModelRejected:
        raise
    except Exception as failure:  # operators raise errors of every class
        raise ModelRejected(f"The program fails on a plain input: {first_line(failure)}") from failure
    if changed := next((name for name, tensor in watched.items() if tensor._version != before[name]), None):
        raise ModelRejected(
            f"The program changes {changed!r} whenever it runs: its output would depend on what ran before. Export a "
            "model whose forward keeps nothing."
        )
    return classes
