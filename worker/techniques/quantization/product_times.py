"""How long products take in ONNX Runtime on this machine: with weights as floats, and in few bits.

Each product is a graph of its own, made and stored as the exporter stores it, and run for the rows that one sample
brings to its layer, all kinds in turns. Products of one shape are measured once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from app.contract.weight_only import FewBits
from worker.data.batch import Inputs
from worker.evaluation.latency import measure_in_turns
from worker.loading.onnx_session import open_session
from worker.techniques.pruning.inputs import matrix
from worker.techniques.pruning.weights import PrunableWeight
from worker.techniques.quantization.grid_math import Grid, whole_range
from worker.techniques.quantization.groups import group_of, nearest
from worker.techniques.quantization.onnx_bits import store_bits
from worker.techniques.quantization.weight_grid import WeightGrid

BUDGET_S = 0.3  # for a shape, beyond what the fewest runs take
NANO = 10**9
BROKEN = 0.25  # what zero points lack to whole numbers, where the algorithm moves them: any number but 0
FLOATS = "floats"
OPSET, IR = 20, 10


@dataclass(frozen=True)
class Costs:
    """What a layer costs in each of the step's bits, and with floats: nanoseconds here."""

    bits: tuple[int, ...]
    floats: int


def is_product(weight: PrunableWeight) -> bool:
    """Whether the runtime has an operator of few bits for the layer."""
    return isinstance(weight.owner, nn.Linear)


def times_of(
    step: FewBits,
    widths: Sequence[int],
    module: nn.Module,
    weights: Sequence[PrunableWeight],
    sample: Inputs,
    folder: Path,
) -> list[Costs]:
    """Of each weight; 0 throughout where its layer is no product, or the sample does not reach it."""
    rows = _rows(module, weights, sample)
    known: dict[tuple[int, ...], Costs] = {}
    found = []
    for weight in weights:
        own = rows.get(weight.owner, 0)
        if not own:
            found.append(Costs((0,) * len(widths), 0))
            continue
        value = matrix(weight, weight.value()).detach().float().cpu()
        group = group_of(step, weight.owner, value.shape[1])
        key = (*value.shape, group, own)
        if key not in known:
            known[key] = _measured(step, widths, value, group, own, folder)
        found.append(known[key])
    return found


def _rows(module: nn.Module, weights: Sequence[PrunableWeight], sample: Inputs) -> dict[nn.Module, int]:
    """How many rows one sample brings to each product, over all calls of its layer."""
    found: dict[nn.Module, int] = {}

    def count(layer: nn.Module, given: tuple[Tensor, ...], _: object) -> None:
        found[layer] = found.get(layer, 0) + given[0].numel() // given[0].shape[-1]

    hooks = [weight.owner.register_forward_hook(count) for weight in weights if is_product(weight)]
    try:
        with torch.no_grad():
            module.eval()(*(tensor[:1] for tensor in sample))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _measured(step: FewBits, widths: Sequence[int], value: Tensor, group: int, rows: int, folder: Path) -> Costs:
    given = {"x": np.random.default_rng(0).normal(size=(rows, value.shape[1])).astype(np.float32)}
    threads = torch.get_num_threads()
    with _graphs(step, widths, value, group, folder) as paths:
        sessions = {name: open_session(path.read_bytes(), threads) for name, path in paths.items()}
        calls = {name: partial(session.run, None, given) for name, session in sessions.items()}
        found = measure_in_turns(calls, batch_size=1, threads=threads, budget_s=BUDGET_S)
    taken = {name: max(1, round(NANO * one.median_s)) for name, one in found.items()}
    return Costs(tuple(taken[str(bits)] for bits in widths), taken[FLOATS])


@contextmanager
def _graphs(step: FewBits, widths: Sequence[int], value: Tensor, group: int, folder: Path) -> Iterator[dict[str, Path]]:
    """The product as floats, and in each of the widths. What the weights are is all the same to the time."""
    with TemporaryDirectory(dir=folder, prefix="products-") as name:
        paths = {FLOATS: Path(name) / "floats.onnx"}
        _save(value, paths[FLOATS])
        for bits in widths:
            source, paths[str(bits)] = Path(name) / "source.onnx", Path(name) / f"{bits}.onnx"
            found, steps, zeros = nearest(value, group, partial(_grid, step, bits))
            _save(found, source)
            store_bits(source, paths[str(bits)], {"w": WeightGrid(bits, group, step.symmetric, steps, zeros)})
        yield paths


def _grid(step: FewBits, bits: int, parts: Tensor) -> Grid:
    grid = whole_range(parts, bits, step.symmetric)
    return replace(grid, zero=grid.zero + BROKEN) if step.moves_zeros else grid


def _save(value: Tensor, path: Path) -> None:
    """y = x W^T of a weight [outputs, columns], as torch's exporter writes it."""
    outputs, columns = value.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(np.ascontiguousarray(value.T.numpy()), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    onnx.save_model(model, str(path))
