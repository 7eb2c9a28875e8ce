"""Statistics of batch norms, found again for a network whose layers give something else than they did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from worker.context import Context
from worker.data.batch import Inputs
from worker.techniques.pruning.samples import has_samples
from worker.techniques.pruning.sensitivity import held_batches

WHY = "Statistics of batch norms are found on data"
Found = dict[str, Tensor]
"""What is found again for a network, such as running means and variances, by names in a state dict."""


class Statistics:
    """Finds them on samples, labelled or not: with inherited weights and statistics of its own a network answers nearly
    as it will behind a training (adaptive batch norm of EagleEye, Li et al. 2020). Without samples, or without batch
    norms in the context's network, there is nothing to find."""

    def __init__(self, context: Context, samples: int) -> None:
        self._inputs: list[Inputs] = []
        if has_samples(context) and followed(context.model.module):
            self._inputs = whole([batch.inputs for batch in held_batches(context, samples, WHY)])

    def of(self, module: nn.Module) -> Found:
        """Puts them into the module's batch norms, and gives them."""
        if not self._inputs:
            return {}
        renew(module, self._inputs)
        return {name: own.clone() for name, own in running(module).items()}


def whole(batches: Sequence[Inputs]) -> list[Inputs]:
    """Without a last one that is much shorter, which would count as much as each other; none of a single sample, which
    has no variance."""
    first = len(batches[0][0])
    return [own for own in batches if len(own[0]) * 2 > first and len(own[0]) > 1]


def followed(module: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that have statistics, by name."""
    named = module.named_modules()
    return {name: one for name, one in named if isinstance(one, _BatchNorm) and one.running_mean is not None}


def running(module: nn.Module) -> Found:
    """The statistics themselves."""
    return {
        f"{path}.{name}".lstrip("."): getattr(layer, name)
        for path, layer in followed(module).items()
        for name in ("running_mean", "running_var")
    }


def renew(module: nn.Module, batches: Sequence[Inputs]) -> None:
    """Sets the running statistics to the mean, over batches, of those of each batch, variances being the unbiased ones
    as in training, while the other layers are in eval mode. The module is so too from then on."""
    layers = list(followed(module).values())
    before = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    counts = dict.fromkeys(layers, 0)

    def count(layer: Any, given: tuple[Tensor, ...]) -> None:
        """A layer that computes twice a pass counts twice; one value a channel has no variance."""
        layer.train(given[0].numel() > given[0].shape[1])
        counts[layer] += layer.training
        layer.momentum = 1 / max(1, counts[layer])

    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    module.eval()
    try:
        for layer in layers:
            layer.num_batches_tracked = None  # how far its training is stays as it was
            layer.train()
        with torch.no_grad():
            for inputs in batches:
                module(*inputs)
    finally:
        module.eval()
        for hook in hooks:
            hook.remove()
        for layer, (momentum, tracked) in zip(layers, before, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, tracked
