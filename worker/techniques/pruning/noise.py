"""Weights that learn how much noise each of them bears while they train: sparse variational dropout.

The noise is drawn for what a layer gives rather than for its weights, once for each output element, which has the same
distribution and gradients of far less variance (the local reparameterization: Kingma, Salimans & Welling 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.constraints import owners, stored
from worker.data.feed import Feed
from worker.model import Model
from worker.structure.calls import called_layers, computes_as
from worker.techniques.pruning import variational_math
from worker.techniques.pruning.weights import PrunableWeight, is_transformers_conv1d

START = -5.0  # log alpha of a weight of a layer's root mean square, before anything is learned
GROWING_SHARE = 0.3  # of the steps that have noise, over which what it costs comes to count in full
NOISE = 3.0  # log alpha of a weight that is nothing but noise
LOOKED_AT = 64  # samples
TRAVEL = 10.0  # what the steps of a training have to be able to move a logarithm by
MOST = 20.0  # that a logarithm moves up: the weight has long been nothing but noise
_LEAST = 1e-8  # variance of an output, whose root has a gradient

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


def takes_noise(layer: nn.Module) -> bool:
    """Whether what a layer gives is a sum of its weights times what it is given, and nothing of its own besides."""
    return computes_as(layer, nn.Linear, nn.Embedding, *_CONVOLUTIONS) or is_transformers_conv1d(layer)


def noisy(model: Model, weights: Sequence[PrunableWeight]) -> list[PrunableWeight]:
    """Those of the weights that only such layers have, and that are computed with by calling these: attention takes the
    weight of its output's layer from under it."""
    layers = [_layers(model.module, weight) for weight in weights]
    called = called_layers(model, [layer for own in layers for layer in own])
    return [
        weight
        for weight, own in zip(weights, layers, strict=True)
        if all(takes_noise(layer) and layer in called for layer in own)
    ]


class WeightNoise(nn.Module):
    """A log variance for each weight, which learns along; forward() is what all of it costs, for the loss.

    `observations` is what the loss is a mean over, in all of the training data. The cost stops where only as many
    weights as are `wanted` are more than noise: what presses on them further takes accuracy and gives nothing.
    """

    def __init__(
        self, module: nn.Module, weights: Sequence[PrunableWeight], observations: float, wanted: float = 1.0
    ) -> None:
        super().__init__()
        self.weights = list(weights)
        self.strength = 0.0
        self._layers = [_layers(module, weight) for weight in weights]
        self._observations = observations
        self._scale = self.rate = 1.0
        self.wanted = wanted
        values = [weight.value() for weight in weights]
        self._starts = [_start(value) for value in values]
        self.moved = nn.ParameterList([nn.Parameter(torch.zeros_like(value)) for value in values])

    def forward(self) -> Tensor:
        """Nats an observation; weights that are zero, as those behind a mask, cost nothing."""
        if not self.strength:
            return torch.zeros((), device=self.moved[0].device)
        costs, counts = [], []
        for place, weight in enumerate(self.weights):
            value: Tensor = getattr(weight.owner, weight.attribute)
            alpha = variational_math.log_alpha(value, self._log_variance(place))
            costs.append(torch.where(value != 0, variational_math.divergence(alpha), 0.0).sum())
            counts.append(((alpha < NOISE) & (value != 0)).sum())
        too_many = torch.stack(counts).sum() / self.wanted - 1
        return self.strength * too_many.clamp(0, 1) / self._observations * torch.stack(costs).sum()

    def scores(self) -> list[Tensor]:
        """The signal to noise of each weight."""
        return [
            variational_math.signal_to_noise(weight.value(), self._log_variance(place).detach())
            for place, weight in enumerate(self.weights)
        ]

    def suit(self, steps: int) -> None:
        """To a training of so many steps, each of which moves a parameter by the `rate` at most: in a short one
        logarithms are taken to move by more than parameters."""
        self._scale = max(1.0, TRAVEL / (steps * self.rate))

    def weaken(self, step: int, end: int) -> None:
        """Before each step: the cost grows from 0 to its whole, and from `end` on there is neither noise nor cost."""
        self.strength = 0.0 if step >= end else min(1.0, (step + 1) / (GROWING_SHARE * end))

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within it layers in training mode give noise, as long as it costs anything."""
        hooks = [
            layer.register_forward_hook(self._hook(place))
            for place, layers in enumerate(self._layers)
            for layer in layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _log_variance(self, place: int) -> Tensor:
        return self._starts[place] + (self._scale * self.moved[place]).clamp(max=MOST)

    def _hook(self, place: int) -> Any:
        def hook(layer: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not (layer.training and self.strength):
                return None
            with torch.autocast(output.device.type, enabled=False):  # squares may leave the range of float16
                variance = torch.where(layer.weight != 0, self._log_variance(place).exp(), 0.0)
                spread = (_variance_of_output(layer, given[0], variance) + _LEAST).sqrt()
                return output + (spread * _normal(spread)).to(output.dtype)

        return hook


def _start(value: Tensor) -> float:
    """The log variance that a layer begins with, by the weights of it that are left."""
    left = value[value != 0]
    return math.log(float(left.square().mean())) + START if len(left) else 0.0


def _normal(like: Tensor) -> Tensor:
    """Standard normal numbers that lie as a tensor does. torch draws them several times as fast where they lie in a
    row, which those of a convolution do in another order."""
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda axis: -strides[axis])
    drawn = torch.randn([like.shape[axis] for axis in order], dtype=like.dtype, device=like.device)
    return drawn.permute([order.index(axis) for axis in range(like.ndim)])


def _variance_of_output(layer: Any, given: Tensor, variance: Tensor) -> Tensor:
    """Of a sum of independent weights: the sum of their variances times the squares of what comes in."""
    if isinstance(layer, nn.Embedding):
        return functional.embedding(given, variance)
    squares = given.float().square()
    if isinstance(layer, nn.Linear):
        return functional.linear(squares, variance)
    convolution = next((own for kind, own in _CONVOLUTIONS.items() if isinstance(layer, kind)), None)
    if convolution is None:
        return squares @ variance
    padding = layer.padding
    if layer.padding_mode != "zeros":
        padding = 0
        squares = functional.pad(squares, layer._reversed_padding_repeated_twice, layer.padding_mode)
    return convolution(squares, variance, None, layer.stride, padding, layer.dilation, layer.groups)


def observations(feed: Feed, seed: int) -> float:
    """The terms of the loss over all of the training data, by those of a few samples."""
    random = torch.Generator().manual_seed(seed)
    batch = feed.task.prepare(next(feed.batches("train", LOOKED_AT, shuffle=random)), random)
    terms = feed.task.terms(batch) or len(batch)  # without targets a teacher speaks of samples
    return terms / len(batch) * feed.size("train")


def _layers(module: nn.Module, weight: PrunableWeight) -> list[nn.Module]:
    """All that hold it: several where it is tied."""
    return [layer for _, layer, _ in owners(module, stored(weight.owner, weight.attribute))]
