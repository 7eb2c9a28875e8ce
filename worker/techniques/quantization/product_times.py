"""How long products take in ONNX Runtime on this machine: with weights as floats, and in few bits.

Each product is a graph of its own, made and stored as the exporter stores it, and run for the rows that a call of its
layer has for one sample, all kinds in turns. Products of one shape are measured once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from app.contract.weight_only import FewBits
from worker.constraints import stored
from worker.data.batch import Inputs
from worker.evaluation.latency import measure_in_turns
from worker.export.onnx import OPSET
from worker.loading.onnx_session import open_session
from worker.techniques.pruning.inputs import matrix
from worker.techniques.pruning.weights import PrunableWeight, is_transformers_conv1d
from worker.techniques.quantization.grid_math import Grid, whole_range
from worker.techniques.quantization.groups import group_of, nearest
from worker.techniques.quantization.mixed_math import Costs
from worker.techniques.quantization.onnx_bits import STORED_BITS, store_bits
from worker.techniques.quantization.weight_grid import WeightGrid

BUDGET_S = 0.3  # for a shape, beyond what the fewest runs take
NANO = 10**9
BROKEN = 0.25  # what zero points lack to whole numbers, where the algorithm moves them: any number but 0
FLOATS = "floats"


def is_product(layer: nn.Module) -> bool:
    """Whether the runtime has an operator of few bits for a layer."""
    return isinstance(layer, nn.Linear) or is_transformers_conv1d(layer)


def times_of(
    step: FewBits,
    widths: Sequence[int],
    module: nn.Module,
    weights: Sequence[PrunableWeight],
    sample: Inputs,
    folder: Path,
) -> list[Costs]:
    """Of each weight, over all calls of all layers that have it; 0 throughout where there is no product, or the sample
    does not reach it as a call of the layer: attention reads the weight of its output projection itself."""
    calls = _calls(module, weights, sample)
    known: dict[tuple[int, ...], Costs] = {}
    found = []
    for weight in weights:
        value = matrix(weight, weight.value()).detach().float().cpu()
        group = group_of(step, weight.owner, value.shape[1])
        total = Costs((0,) * len(widths), 0)
        for rows, times in calls[weight.name].items():
            key = (*value.shape, group, rows)
            if key not in known:
                known[key] = _measured(step, widths, value, group, rows, folder)
            total = total.plus(known[key], times)
        found.append(total)
    return found


def _calls(module: nn.Module, weights: Sequence[PrunableWeight], sample: Inputs) -> dict[str, Counter[int]]:
    """For each weight how often one sample brings so many rows to a product."""
    names = {id(stored(weight.owner, weight.attribute)): weight.name for weight in weights}
    found: dict[str, Counter[int]] = {weight.name: Counter() for weight in weights}

    def hooked(name: str, layer: nn.Module) -> RemovableHandle:
        def count(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], __: Any) -> None:
            value = given[0] if given else next(iter(named.values()))
            found[name][value.numel() // value.shape[-1]] += 1

        return layer.register_forward_hook(count, with_kwargs=True)

    layers = [(layer, names.get(id(stored(layer, "weight")))) for layer in module.modules() if is_product(layer)]
    hooks = [hooked(name, layer) for layer, name in layers if name is not None]
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
    return Costs(tuple(taken[str(STORED_BITS[bits])] for bits in widths), taken[FLOATS])


@contextmanager
def _graphs(step: FewBits, widths: Sequence[int], value: Tensor, group: int, folder: Path) -> Iterator[dict[str, Path]]:
    """The product as floats, and in each of the widths as they are stored, 3 bits being 4. What the weights are is all
    the same to the time."""
    with TemporaryDirectory(dir=folder, prefix="products-") as name:
        paths = {FLOATS: Path(name) / "floats.onnx"}
        _save(value, paths[FLOATS])
        for bits in sorted({STORED_BITS[width] for width in widths}):
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
    model = helper.make_model_gen_version(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    onnx.save_model(model, str(path))
