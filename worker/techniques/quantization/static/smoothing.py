"""SmoothQuant in a graph: factors for the channels in front of products, where one grid cannot hold all of them.

The inverse factors go into the norm that makes the channels, if nothing else reads it, or else into a multiplication
of their own, which costs time; so they come only where they save much of the error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from worker.techniques.quantization.graph import constants, free_name, replace_constant, uses
from worker.techniques.quantization.static.observing import Observed, grouped
from worker.techniques.quantization.static.products import Product, products
from worker.techniques.quantization.static.smoothing_math import best_factors

ROWS = 1024  # of channels that factors are tried on
WORTH = 0.7  # of the error that may be left where a multiplication is spent on it
NORMS = ("LayerNormalization",)

Row = dict[str, Any]


def smooth(proto: ModelProto, observed: Observed, chosen: Iterable[str], bits: int) -> tuple[list[Row], list[str]]:
    """Changes the graph in place; what it gives stays the same. `chosen` are the names of nodes that will be rounded.

    Returns what was done (the tensor, the factors, and what is left of the error of the products that read it), and the
    names of the multiplications that this took.
    """
    wanted = set(chosen)
    places: dict[str, list[Product]] = {}
    for product in products(proto.graph, observed.tensors):
        if product.node.name in wanted and product.node.op_type != "Conv":
            places.setdefault(product.given, []).append(product)
    names = {product.weight for own in places.values() for product in own}
    values = constants(proto.graph, names)
    rows: list[Row] = []
    spent: list[str] = []
    for tensor, given in _inputs(observed, list(places)):
        own = places[tensor]
        weights = [product.matrix(values[product.weight]) for product in own]
        scale, factors, left = best_factors(given, weights, bits)
        if not left <= WORTH:  # nor where it is no number
            continue
        for product, weight in zip(own, weights, strict=True):
            replace_constant(
                proto.graph, product.weight, product.unmatrix(weight * scale, values[product.weight].shape)
            )
        spent += _divide(proto.graph, tensor, own, scale.numpy())
        rows.append({"tensor": tensor, "factors": factors, "error_left": left})
    return rows, spent


def _inputs(observed: Observed, tensors: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Rows [rows, channels] of each tensor, drawn from all batches."""
    sizes = observed.sizes(tensors)
    most = max(1, ROWS // len(observed.samples))
    for group in grouped(tensors, lambda tensor: sizes[tensor]):
        found: dict[str, list[Tensor]] = {tensor: [] for tensor in group}
        generator = torch.Generator().manual_seed(0)
        for values in observed.watch(group):
            for tensor in group:
                rows = torch.from_numpy(values[tensor]).reshape(-1, values[tensor].shape[-1])
                found[tensor].append(rows[torch.randperm(len(rows), generator=generator)[:most]])
        yield from ((tensor, torch.cat(parts)) for tensor, parts in found.items())


def _divide(graph: GraphProto, tensor: str, readers: list[Product], scale: np.ndarray) -> list[str]:
    """Makes these products read the tensor divided by the factors; the multiplication, if that took one."""
    norm = next((node for node in graph.node if node.output[:1] == [tensor]), None)
    if norm is not None and _foldable(graph, norm, tensor, len(readers)):
        for name in norm.input[1:]:
            replace_constant(graph, name, constants(graph, {name})[name] / scale)
        return []
    inverse, smoothed, name = (free_name(graph, f"{tensor}_{end}") for end in ("smoothing", "smoothed", "smooth"))
    graph.initializer.append(numpy_helper.from_array((1 / scale).astype(np.float32), inverse))
    graph.value_info.extend(_like(graph, tensor, smoothed))
    for product in readers:
        product.node.input[0] = smoothed
    first = min(index for index, node in enumerate(graph.node) if smoothed in node.input)
    graph.node.insert(first, helper.make_node("Mul", [tensor, inverse], [smoothed], name))
    return [name]


def _foldable(graph: GraphProto, node: NodeProto, tensor: str, readers: int) -> bool:
    """Whether a node is a norm whose gain and shift are constants of its own, and that nothing else reads."""
    counts = uses(graph)
    constant = {one.name for one in graph.initializer}
    own = all(name in constant and counts[name] == 1 for name in node.input[1:])
    return node.op_type in NORMS and len(node.input) > 1 and own and counts[tensor] == readers


def _like(graph: GraphProto, tensor: str, name: str) -> Iterator[ValueInfoProto]:
    """The type of a tensor, which may be an input or an output of the graph, for one of another name."""
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.name == tensor:
            new = ValueInfoProto.FromString(value.SerializeToString())
            new.name = name
            yield new
            return
