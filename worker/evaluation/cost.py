"""What one sample costs: work, time and memory, found out once when a model is inspected."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from app.contract.facts import Cost, LayerFacts
from worker.data.batch import Inputs
from worker.evaluation.macs import layer_macs
from worker.evaluation.onnx_macs import graph_macs
from worker.loading.onnx_direct import DirectModule
from worker.model import Model

RUNS = 3  # a median of them is not fooled by one that was interrupted
BATCH = 2
# Weights, their gradients, the two moments of Adam, and a teacher's weights.
TRAINING_COPIES = 5


def measure_cost(model: Model) -> tuple[Cost, tuple[LayerFacts, ...]]:
    """The cost of a sample, and the model's layers with their MACs. The module is in eval mode and on the CPU."""
    one, several = model.example(1), model.example(BATCH)
    if isinstance(model.module, DirectModule):
        macs = {"": graph_macs(model.module.graph(), model.module.feed(one))}
    else:
        macs = layer_macs(model.module, one)
    weights = tensor_bytes(list(model.module.state_dict().values()))
    kept = (saved_bytes(model.module, several) - saved_bytes(model.module, one)) // (BATCH - 1)
    is_open = any(size is None for tensor in model.facts.inputs for size in tensor.shape)
    cost = Cost(
        length=model.example_length if is_open else None,
        macs=macs.get("", 0),
        seconds=_seconds(model.module, several) / BATCH,
        weight_bytes=weights,
        activation_bytes=max(kept, 0),
        inference_bytes=weights + max(kept, 0),
        training_bytes=TRAINING_COPIES * weights,
    )
    if isinstance(model.module, DirectModule):
        return cost, model.facts.layers
    return cost, tuple(_with_macs(model.facts.layers, macs, {name for name, _ in model.module.named_modules()}))


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors, those that share a storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def saved_bytes(module: nn.Module, inputs: Inputs) -> int:
    """Bytes that autograd keeps of a forward pass for the backward one; weights and shared storages are not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}  # held, so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*inputs)
    return tensor_bytes(list(kept.values()))


def _seconds(module: nn.Module, inputs: Inputs) -> float:
    """The median time of a forward pass, after one that is not counted."""
    taken = []
    with torch.inference_mode():
        module(*inputs)
        for _ in range(RUNS):
            start = time.perf_counter()
            module(*inputs)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _with_macs(layers: Sequence[LayerFacts], macs: dict[str, int], modules: set[str]) -> Iterator[LayerFacts]:
    """A weight that is listed by its own name belongs to the module before the last dot."""
    seen: set[str] = set()
    for layer in layers:
        owner = layer.name if layer.name in modules else layer.name.rpartition(".")[0]
        yield layer.model_copy(update={"macs": 0 if owner in seen else macs.get(owner, 0)})
        seen.add(owner)
