"""A declarative architecture as torch modules, with the state dict of the same nesting in `nn.Sequential`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from app.contract.architecture import Parallel as ParallelSpec
from app.contract.architecture import Residual as ResidualSpec
from app.contract.architecture import Sequential as SequentialSpec
from app.contract.layers import Layer


class Residual(nn.Module):
    """layers(x) + shortcut(x); an empty shortcut is the identity."""

    def __init__(self, layers: nn.Sequential, shortcut: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers
        self.shortcut = shortcut

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs) + self.shortcut(inputs)


class Parallel(nn.Module):
    """Every branch on the same input; the outputs are concatenated along `dim` or added."""

    def __init__(self, branches: Sequence[nn.Sequential], join: str, dim: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.join = join
        self.dim = dim

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = [branch(inputs) for branch in self.branches]
        return torch.cat(outputs, dim=self.dim) if self.join == "concat" else torch.stack(outputs).sum(0)


class LSTM(nn.LSTM):
    """An LSTM on [batch, steps, features] that gives one tensor: every step's output, or the final hidden state."""

    def __init__(self, *, output: str, **arguments: object) -> None:
        super().__init__(**arguments)
        self.output = output

    def forward(self, inputs: Tensor, states: Any = None) -> Tensor:  # type: ignore[override]  # one tensor
        if inputs.is_meta:
            return _shape_of_output(self, inputs, self.output)
        steps, (hidden, _) = super().forward(inputs, states)
        return steps if self.output == "sequence" else _final(hidden, self.bidirectional)


class GRU(nn.GRU):
    """A GRU with the outputs of `LSTM`."""

    def __init__(self, *, output: str, **arguments: object) -> None:
        super().__init__(**arguments)
        self.output = output

    def forward(self, inputs: Tensor, states: Any = None) -> Tensor:  # type: ignore[override]  # one tensor
        if inputs.is_meta:
            return _shape_of_output(self, inputs, self.output)
        steps, hidden = super().forward(inputs, states)
        return steps if self.output == "sequence" else _final(hidden, self.bidirectional)


def _final(hidden: Tensor, bidirectional: bool) -> Tensor:
    """The last layer's hidden state [batch, features], both directions side by side; hidden is [layers, batch, …]."""
    return torch.cat((hidden[-2], hidden[-1]), dim=1) if bidirectional else hidden[-1]


def _shape_of_output(layer: nn.RNNBase, inputs: Tensor, output: str) -> Tensor:
    """What the layer would give, without memory: torch itself walks every step on the meta device, which takes long."""
    if inputs.ndim != 3:
        raise ValueError(f"expected [batch, steps, features], got {list(inputs.shape)}")
    layer.check_input(inputs, None)
    features = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
    batch, steps, _ = inputs.shape
    return inputs.new_empty((batch, steps, features) if output == "sequence" else (batch, features))


def build(layers: Sequence[Layer]) -> nn.Sequential:
    """The modules of an architecture, on torch's current default device."""
    return nn.Sequential(*(_module(layer) for layer in layers))


def _module(layer: Layer) -> nn.Module:
    if isinstance(layer, SequentialSpec):
        return build(layer.layers)
    if isinstance(layer, ResidualSpec):
        return Residual(build(layer.layers), build(layer.shortcut))
    if isinstance(layer, ParallelSpec):
        return Parallel([build(branch) for branch in layer.branches], layer.join, layer.dim)
    arguments = {name: value for name, value in layer if name != "type"}
    if "inplace" in arguments:
        arguments["inplace"] = False  # only an optimization, and one that would change what a shortcut sees
    own: dict[str, type[nn.Module]] = {"LSTM": LSTM, "GRU": GRU}
    kind: type[nn.Module] = own.get(layer.type) or getattr(nn, layer.type)
    return kind(**arguments)
