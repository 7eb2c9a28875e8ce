"""Whether an ONNX graph runs, on which sizes and batches, and whether a module imported from it says the same."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor, fx

from app.contract.architecture import MAX_INPUT_ELEMENTS
from app.contract.errors import ModelRejected
from worker.data.batch import Inputs
from worker.loading.heads import to_outputs
from worker.loading.onnx_constants import held_tensors
from worker.loading.onnx_direct import DirectModule
from worker.loading.onnx_graph import NotImportable, failing_operator
from worker.loading.onnx_narrow import WIDE
from worker.model import EXAMPLE_LENGTH, Model
from worker.vetting.boundary import first_line
from worker.vetting.onnx import graphs

# An imported module and ONNX Runtime add in different orders; share of the largest output.
TOLERANCE = 1e-4
# A graph that computes in float16 rounds every value on its way, and its module does not.
HALF_TOLERANCE = 2e-2
# Lengths that open dimensions are tried with: networks that halve their input five times need 32.
LENGTHS = (2 * EXAMPLE_LENGTH, EXAMPLE_LENGTH, 128, 16, 256, 512)
MAX_IDS = 1000  # random ids are drawn from so many at most, all of which a table knows


def sized(model: Model) -> Model:
    """The model with a length of its open dimensions that it runs on, with half of it too where there is one such.

    Raises ModelRejected where ONNX Runtime runs it on none.
    """
    is_open = any(size is None for tensor in model.facts.inputs for size in tensor.shape)
    failures: list[Exception] = []
    working: list[int] = []
    for length in LENGTHS if is_open else (EXAMPLE_LENGTH,):
        if _elements(model, length) > MAX_INPUT_ELEMENTS:
            continue
        failed = _failure(model, length)
        if failed is None:
            working.append(length)
            failed = _failure(model, length // 2) if is_open else None
        if failed is None:
            return replace(model, example_length=length)
        failures.append(failed)
    if working:
        return replace(model, example_length=working[0])
    if not failures:
        raise ModelRejected(f"A sample of the model has more than {MAX_INPUT_ELEMENTS} elements.")
    raise ModelRejected(f"ONNX Runtime cannot run the model on a plain input: {first_line(failures[0])}") from failures[
        0
    ]


def batched(model: Model, proto: ModelProto) -> Model:
    """The model running sample by sample where the graph fixes a batch of 1 that its inputs leave open.

    Raises ModelRejected where a sample's output depends on the others of its batch.
    """
    two = model.example(2)
    apart = torch.cat([model.module(*(tensor[i : i + 1] for tensor in two)) for i in range(2)])
    try:
        together = model.module(*two)
    except Exception:  # onnxruntime's errors share no class below Exception
        names = tuple(tensor.name for tensor in model.facts.inputs)
        module = DirectModule(proto, names, model.facts.output_kind, single=True)
        return replace(model, module=module, facts=model.facts.model_copy(update={"single_samples": True}))
    if together.shape != apart.shape or not _close(together.numpy(), apart.numpy(), HALF_TOLERANCE):
        raise ModelRejected(
            "The model gives other outputs for two samples together than for each alone: its first dimension is no "
            "batch, or the samples of a batch influence each other."
        )
    return model


def check_agreement(module: fx.GraphModule, direct: Model, vocabularies: dict[str, int], tolerance: float) -> None:
    """Raises NotImportable unless the module gives what ONNX Runtime gives for batches of 2 and 1, short and long."""
    for inputs in (direct.example(2), _with_ids(direct, direct.example(1, seed=1), vocabularies)):
        _check_one(module, direct, inputs, tolerance)
    if not any(size is None for tensor in direct.facts.inputs for size in tensor.shape):
        return
    # Another length: the half, or, where that is too little for the network to leave anything, the double.
    refusals: list[NotImportable] = []
    for length in (direct.example_length // 2, 2 * direct.example_length):
        if _elements(direct, length) > MAX_INPUT_ELEMENTS or _failure(direct, length) is not None:
            continue
        inputs = _with_ids(direct, direct.example(3, seed=2, length=length), vocabularies)
        try:
            return _check_one(module, direct, inputs, tolerance)
        except NotImportable as refusal:
            refusals.append(refusal)
    if refusals:
        raise refusals[0]


def _check_one(module: fx.GraphModule, direct: Model, inputs: Inputs, tolerance: float) -> None:
    kind = direct.facts.output_kind
    try:
        with torch.no_grad():
            logits: Tensor = module(*inputs)
    except Exception as failure:  # torch's errors for shapes that do not fit are of many classes
        raise NotImportable(f"As a torch module it fails: {failing_operator(module, inputs)}.") from failure
    got, wanted = to_outputs(kind, logits.numpy()), to_outputs(kind, direct.module(*inputs).numpy())
    if got.shape != wanted.shape:
        raise NotImportable(
            f"As a torch module it gives {list(got.shape)} where ONNX Runtime gives {list(wanted.shape)}."
        )
    if not _close(got, wanted, tolerance):
        difference = float(np.max(np.abs(got - wanted)))
        raise NotImportable(f"As a torch module its outputs differ from ONNX Runtime's by {difference:.3g}.")


def tolerance_of(proto: ModelProto) -> float:
    """How far a float32 module may be from the graph."""
    return HALF_TOLERANCE if computes_in_half(proto) else TOLERANCE


def computes_in_half(proto: ModelProto) -> bool:
    """Whether the graph holds tensors of float16 that it computes with."""
    return computed_with(proto, TensorProto.FLOAT16) is not None


def computed_with(proto: ModelProto, kind: int) -> str | None:
    """The name of a tensor of a type that anything but a Cast to a wider one takes."""
    widened: set[str] = set()
    read: set[str] = set()
    for node in (node for graph in graphs(proto.graph) for node in graph.node):
        wide = node.op_type == "Cast" and any(one.name == "to" and one.i in WIDE for one in node.attribute)
        (widened if wide else read).update(node.input)
    held = (pair for graph in graphs(proto.graph) for pair in held_tensors(graph))
    names = (name for name, tensor in held if tensor.data_type == kind)
    return next((name for name in names if name in read or name not in widened), None)


def _with_ids(model: Model, inputs: Inputs, vocabularies: dict[str, int]) -> Inputs:
    """The inputs with random ids in place of ones, where it is known how many there are."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for facts, tensor in zip(model.facts.inputs, inputs, strict=True):
        known = min(MAX_IDS, vocabularies.get(facts.name, 0))
        random: Any = torch.randint(known, tensor.shape, generator=generator).to(tensor.dtype) if known > 0 else tensor
        made.append(random)
    return tuple(made)


def _failure(model: Model, length: int) -> Exception | None:
    """What goes wrong with one sample of that length."""
    try:
        output: Tensor = model.module(*model.example(1, length=length))
    except Exception as failure:  # onnxruntime's errors share no class below Exception
        return failure
    finite = output.numel() > 0 and bool(output.isfinite().all())
    return None if finite else ValueError("its output is empty, NaN or infinite")


def _elements(model: Model, length: int) -> int:
    return sum(prod(length if size is None else size for size in tensor.shape) for tensor in model.facts.inputs)


def _close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    """Within a share of the largest value, or of one; not so where either is not a number."""
    return bool(np.max(np.abs(a - b), initial=0.0) <= tolerance * max(1.0, float(np.max(np.abs(b), initial=0.0))))
