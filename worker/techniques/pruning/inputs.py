"""What comes into layers whose weight is a matrix, or a kernel that is slid over an input: columns of a product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from worker.techniques.pruning.weights import PrunableWeight, is_transformers_conv1d


def takes_columns(layer: nn.Module) -> bool:
    """Whether the layer is a product of its weight with its input, all of whose outputs see all of the input."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.groups == 1
    return isinstance(layer, nn.Linear) or is_transformers_conv1d(layer)


def matrix(weight: PrunableWeight, tensor: Tensor) -> Tensor:
    """[outputs, columns] of a tensor of the weight's shape: for each place of a kernel its inputs side by side."""
    moved = weight.by_output(tensor).movedim(1, -1)
    return moved.reshape(len(moved), -1)


def unmatrix(weight: PrunableWeight, rows: Tensor) -> Tensor:
    """What `matrix` has laid out, of the weight's shape."""
    shape = weight.by_output(torch.empty(weight.value().shape, device="meta")).shape
    return weight.by_output(rows_by_output(rows, shape))


def rows_by_output(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """A matrix [outputs, columns] in the `shape` [outputs, inputs, …] of what it was laid out from."""
    outputs, inputs, *places = shape
    return rows.reshape(outputs, *places, inputs).movedim(-1, 1)


def columns(layer: nn.Module, given: Tensor) -> Tensor:
    """[products, columns] of an input: the row that the weight's matrix is multiplied with for each output element."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return given.reshape(-1, given.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    given = functional.pad(given, layer._reversed_padding_repeated_twice, mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, nn.Conv1d):  # one that is one high
        given, kernel, stride, dilation = given.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    unfolded = functional.unfold(given, kernel, dilation, 0, stride)  # [batch, inputs * places, products]
    apart = unfolded.unflatten(1, (layer.in_channels, -1))  # a row of the matrix has the places first
    return apart.permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


def channels(layer: nn.Module, given: Tensor) -> Tensor:
    """[places, inputs] of an input: what comes in at each place, whatever the size of a kernel."""
    if isinstance(layer, _ConvNd):
        given = given.movedim(1, -1)
    return given.reshape(-1, given.shape[-1])


Rows = Callable[[nn.Module, Tensor], Tensor]
"""Lays out what comes into a layer."""


class Moments:
    """The sum over all that was seen of x x^T (float32 [columns, columns]), or of its diagonal alone."""

    def __init__(self, full: bool) -> None:
        self._full = full
        self.sum: Tensor | None = None

    def see(self, rows: Tensor) -> None:
        """Takes in [products, columns]."""
        rows = rows.detach().float()
        own = rows.T @ rows if self._full else rows.square().sum(0)
        self.sum = own if self.sum is None else self.sum + own

    @property
    def nbytes(self) -> int:
        return 0 if self.sum is None else self.sum.nbytes


@contextmanager
def watching(layers: list[nn.Module], full: bool, rows: Rows = columns) -> Iterator[list[Moments]]:
    """Within it, what comes into the layers is added up for each, laid out in `rows`."""
    moments = [Moments(full) for _ in layers]
    hooks = [layer.register_forward_pre_hook(_seen(own, rows)) for layer, own in zip(layers, moments, strict=True)]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def _seen(moments: Moments, rows: Rows) -> Any:
    def hook(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        moments.see(rows(layer, given[0]))

    return hook
