"""Weights of a graph on their grids, so that what its products give changes least, and biases that make up for it.

Each product is looked at by itself: W becomes Q with the least ||(W - Q) X||^2 over the calibration samples, the
objective of AdaRound (Nagel et al. 2020), reached by GPTQ (Frantar et al. 2023) and sweeps of coordinate descent rather
than by gradients. What the mean of the outputs still moves by goes to the bias (Nagel et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor

from app.contract.errors import ExportFailed
from worker.techniques.quantization import gptq_math
from worker.techniques.quantization.graph import constants, free_name, replace_constant
from worker.techniques.quantization.grid_math import least_squares
from worker.techniques.quantization.groups import nearest
from worker.techniques.quantization.static.observing import Observed, grouped
from worker.techniques.quantization.static.products import Product, products

ROWS = 16_384  # of an input that a weight is fitted to, at least
ROWS_A_COLUMN = 4  # and so many times its columns
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Rounded:
    """Steps [outputs] of a weight whose values lie on them, along an axis."""

    steps: np.ndarray
    axis: int


def round_weights(
    proto: ModelProto, observed: Observed, chosen: Iterable[str], bits: int, *, adaptive: bool, correct: bool
) -> dict[str, Rounded]:
    """Rounds the products' weights (`chosen` are the names of their nodes) in place, and corrects biases if asked to.

    `bits` of symmetric codes, a step an output. Pruned weights stay zero. Without `adaptive` each weight goes to the
    nearest.
    """
    wanted = set(chosen)
    own = [product for product in products(proto.graph, observed.tensors) if product.node.name in wanted]
    names = {name for product in own for name in (product.weight, product.bias) if name is not None}
    values = constants(proto.graph, names)
    found: dict[str, Rounded] = {}
    changed: dict[str, np.ndarray] = {}
    looking = observed if adaptive or correct else None
    for product, looked in _with_inputs(own, values, looking, adaptive):
        before = product.matrix(values[product.weight])
        after, steps = _nearest(before, bits) if looked.moments is None else _rounded(before, looked.moments, bits)
        found[product.weight] = Rounded(steps.numpy(), product.axis)
        changed[product.weight] = product.unmatrix(after, values[product.weight].shape)
        if not correct:
            continue
        moved = ((before - after) @ looked.mean).numpy()
        if product.bias is not None:
            changed[product.bias] = values[product.bias] + moved
        elif product.takes_bias and moved.any():
            name = free_name(proto.graph, f"{product.weight}_bias")
            product.node.input.append(name)
            proto.graph.initializer.append(numpy_helper.from_array(moved, name))
    for name, value in changed.items():
        replace_constant(proto.graph, name, value)
    return found


class _Inputs:
    """What comes into a product: the mean of its columns, and where asked for X X^T, of `most` rows a batch."""

    def __init__(self, product: Product, shape: tuple[int, ...], batches: int, full: bool) -> None:
        self._product = product
        self._kernel = shape[2:] if product.node.op_type == "Conv" else ()
        columns = math.prod(shape) // shape[product.axis]
        self._most = -(-max(ROWS, ROWS_A_COLUMN * columns) // batches)
        self._sum = torch.zeros(columns, dtype=torch.float64)
        self._rows = 0
        self._generator = torch.Generator().manual_seed(0)
        self.moments = torch.zeros(columns, columns) if full else None

    @property
    def mean(self) -> Tensor:
        return (self._sum / max(1, self._rows)).float()

    def see(self, given: np.ndarray) -> None:
        """Takes in a batch; of pictures one at a time, since their columns are many times as large as they are."""
        for part in np.split(given, len(given)) if self._kernel else [given]:
            rows = self._product.columns(part, self._kernel)
            self._sum += rows.sum(0, dtype=torch.float64)
            self._rows += len(rows)
            if self.moments is None:
                continue
            most = -(-self._most * len(part) // len(given))
            if len(rows) > most:
                rows = rows[torch.randperm(len(rows), generator=self._generator)[:most]]
            self.moments += rows.T @ rows


def _with_inputs(
    own: Sequence[Product], values: Mapping[str, np.ndarray], observed: Observed | None, full: bool
) -> Iterator[tuple[Product, _Inputs]]:
    """Each product with what comes into it, of several in one pass."""
    shapes = {product.weight: values[product.weight].shape for product in own}
    sizes = {} if observed is None else observed.sizes([product.given for product in own])

    def cost(product: Product) -> int:
        columns = values[product.weight].size // shapes[product.weight][product.axis]
        return sizes.get(product.given, 0) + (FLOAT_BYTES * columns**2 if full else 0)

    for group in grouped(own, cost):
        batches = 1 if observed is None else len(observed.samples)
        looked = [_Inputs(product, shapes[product.weight], batches, full and observed is not None) for product in group]
        if observed is not None:
            for tensors in observed.watch(list(dict.fromkeys(product.given for product in group))):
                for product, one in zip(group, looked, strict=True):
                    one.see(tensors[product.given])
        yield from zip(group, looked, strict=True)


def _nearest(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    after, steps, _ = nearest(weight, weight.shape[1], lambda parts: least_squares(parts, bits, symmetric=True))
    return after, steps.flatten()


def _rounded(weight: Tensor, moments: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    if not moments.isfinite().all():
        raise ExportFailed("With the calibration samples what comes into a product is not finite.")
    columns = weight.shape[1]
    codes, grids = gptq_math.quantized(weight, moments, weight != 0, bits, columns, symmetric=True)
    return gptq_math.values(codes, grids, columns), grids[0].step.flatten()
