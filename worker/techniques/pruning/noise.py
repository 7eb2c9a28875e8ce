"""Weights that learn how much noise each of them bears while they train: sparse variational dropout.

The noise is drawn for what a layer gives rather than for its weights, once for each output element, which has the same
distribution and gradients of far less variance (the local reparameterization: Kingma, Salimans & Welling 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.constraints import owners, stored
from worker.data.feed import Feed
from worker.model import Model
from worker.techniques.pruning import variational_math
from worker.techniques.pruning.weights import PrunableWeight, is_transformers_conv1d

START = -5.0  # log alpha of a weight of a layer's root mean square, before anything is learned
GROWING_SHARE = 0.3  # of the steps that have noise, over which what it costs comes to count in full
NOISE = 3.0  # log alpha of a weight that is nothing but noise
LOOKED_AT = 64  # samples
TRAVEL = 10.0  # what the steps of a training have to be able to move a logarithm by
_LEAST = 1e-8  # variance of an output, whose root has a gradient

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


def takes_noise(layer: nn.Module) -> bool:
    """Whether what a layer gives is a sum of its weights times what it is given."""
    return isinstance(layer, (nn.Linear, nn.Embedding, *_CONVOLUTIONS)) or is_transformers_conv1d(layer)


def noisy(model: Model, weights: Sequence[PrunableWeight]) -> list[PrunableWeight]:
    """Those of the weights that only such layers have, and that are computed with by calling these: attention takes the
    weight of its output's layer from under it."""
    layers = [_layers(model.module, weight) for weight in weights]
    called = _called(model, [layer for own in layers for layer in own])
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
        self, module: nn.Module, weights: Sequence[PrunableWeight], observations: float, wanted: float
    ) -> None:
        super().__init__()
        self.weights = list(weights)
        self.strength = 0.0
        self._layers = [_layers(module, weight) for weight in weights]
        self._observations = observations
        self._scale = 1.0
        self._wanted = wanted
        values = [weight.value() for weight in weights]
        self._starts = [float((value.square().mean() + torch.finfo().tiny).log()) + START for value in values]
        self.moved = nn.ParameterList([nn.Parameter(torch.zeros_like(value)) for value in values])

    def forward(self) -> Tensor:
        """Nats an observation; weights that are zero, as those behind a mask, cost nothing."""
        costs, counts = [], []
        for place, weight in enumerate(self.weights):
            value: Tensor = getattr(weight.owner, weight.attribute)
            alpha = variational_math.log_alpha(value, self._log_variance(place))
            costs.append(torch.where(value != 0, variational_math.divergence(alpha), 0.0).sum())
            counts.append((alpha < NOISE).sum())
        too_many = torch.stack(counts).sum() / self._wanted - 1
        return self.strength * too_many.clamp(0, 1) / self._observations * torch.stack(costs).sum()

    def scores(self) -> list[Tensor]:
        """The signal to noise of each weight."""
        return [
            variational_math.signal_to_noise(weight.value(), self._log_variance(place).detach())
            for place, weight in enumerate(self.weights)
        ]

    def suit(self, moves: float) -> None:
        """To a training that moves a parameter by so much at most, its steps times its rate: in a short one logarithms
        are taken to move by more than parameters."""
        self._scale = max(1.0, TRAVEL / moves)

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
        return self._starts[place] + self._scale * self.moved[place]

    def _hook(self, place: int) -> Any:
        def hook(layer: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not (layer.training and self.strength):
                return None
            variance = torch.where(layer.weight != 0, self._log_variance(place).exp(), 0.0)
            spread = (_variance_of_output(layer, given[0], variance) + _LEAST).sqrt()
            return output + (spread * torch.randn_like(spread)).to(output.dtype)

        return hook


def _variance_of_output(layer: Any, given: Tensor, variance: Tensor) -> Tensor:
    """Of a sum of independent weights: the sum of their variances times the squares of what comes in."""
    if isinstance(layer, nn.Embedding):
        return functional.embedding(given, variance).float()
    squares = given.square()
    if isinstance(layer, nn.Linear):
        return functional.linear(squares, variance).float()
    convolution = next((own for kind, own in _CONVOLUTIONS.items() if isinstance(layer, kind)), None)
    if convolution is None:
        return (squares @ variance).float()
    padding = layer.padding
    if layer.padding_mode != "zeros":
        padding = 0
        squares = functional.pad(squares, layer._reversed_padding_repeated_twice, layer.padding_mode)
    return convolution(squares, variance, None, layer.stride, padding, layer.dilation, layer.groups).float()


def observations(feed: Feed, seed: int) -> float:
    """The terms of the loss over all of the training data, by those of a few samples."""
    random = torch.Generator().manual_seed(seed)
    batch = feed.task.prepare(next(feed.batches("train", LOOKED_AT, shuffle=random)), random)
    return max(1.0, feed.task.terms(batch) / len(batch) * feed.size("train"))


def _called(model: Model, layers: Sequence[nn.Module]) -> set[nn.Module]:
    """Those of the layers that a pass of the network calls."""
    found: set[nn.Module] = set()
    hooks = [layer.register_forward_pre_hook(lambda own, _: found.add(own)) for layer in layers]
    training, device = model.module.training, next(model.module.parameters()).device
    try:
        with torch.no_grad():
            model.module.eval()(*(tensor.to(device) for tensor in model.example(2)))
    finally:
        model.module.train(training)
        for hook in hooks:
            hook.remove()
    return found


def _layers(module: nn.Module, weight: PrunableWeight) -> list[nn.Module]:
    """All that hold it: several where it is tied."""
    return [layer for _, layer, _ in owners(module, stored(weight.owner, weight.attribute))]
