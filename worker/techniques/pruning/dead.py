"""Weights that nothing depends on: behind inputs that are always zero, of neurons that never fire or that nobody hears.

What the network gives does not change with them, on any of the samples that it is asked of.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from worker.constraints import stored
from worker.context import Context
from worker.techniques.pruning.weights import WeightSet
from worker.training.loop import fed

BATCH = 256


def drop_dead(context: Context, weights: WeightSet, samples: int) -> int:
    """Drops weights whose gradient is zero on all samples, and zeroes biases like that; returns how many weights went.

    The gradient is that of the outputs in random directions, which no loss has made small. The network is in eval mode.
    """
    parameters = [stored(weight.owner, weight.attribute) for weight in weights.weights]
    biases = _biases(weights)
    told = _heard(context, [*parameters, *biases], samples)
    kept = weights.kept()
    dead = [mask & ~own for mask, own in zip(kept, told, strict=False)]
    weights.drop([~mask | gone for mask, gone in zip(kept, dead, strict=True)])
    with torch.no_grad():
        for bias, own in zip(biases, told[len(parameters) :], strict=True):
            bias.masked_fill_(~own, 0.0)
    return sum(int(gone.sum()) for gone in dead)


def _biases(weights: WeightSet) -> list[nn.Parameter]:
    """Of the layers whose one weight is in the set."""
    found = []
    for weight in weights.weights:
        bias = weight.owner._parameters.get("bias")
        if weight.attribute == "weight" and bias is not None and bias.requires_grad:
            found.append(bias)
    return found


def _heard(context: Context, parameters: list[nn.Parameter], samples: int) -> list[Tensor]:
    """Where any output of any sample has a gradient."""
    feed, module = fed(context.feed), context.model.module
    generator = torch.Generator().manual_seed(context.seed)
    heard = [torch.zeros_like(parameter, dtype=torch.bool) for parameter in parameters]
    for batch in feed.batches("train", BATCH, shuffle=generator, limit=samples):
        outputs: Tensor = module(*batch.to(context.device).inputs)
        directions = torch.randn(outputs.shape, generator=generator).to(outputs)
        gradients = torch.autograd.grad((outputs * directions).sum(), parameters, allow_unused=True)
        for own, gradient in zip(heard, gradients, strict=True):
            if gradient is not None:
                own |= gradient != 0
    return heard
