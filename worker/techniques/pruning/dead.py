"""Weights that nothing depends on: behind inputs that are always zero, of neurons that never fire or that nobody hears.

What the network gives does not change with them, on any of the samples that it is asked of.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from worker.constraints import stored
from worker.context import Context
from worker.data.batch import Batch
from worker.techniques.pruning.gradients import asked
from worker.techniques.pruning.weights import WeightSet
from worker.training.loop import fed

BATCH = 256
TOLERANCE = 1e-4  # of outputs: sums without zeros add up in another order


def drop_dead(context: Context, weights: WeightSet, samples: int) -> int:
    """Drops weights whose gradient is zero on all samples, and zeroes biases like that; returns how many weights went.

    The gradient is that of the outputs in random directions, which no loss has made small. Since a saturated neuron has
    none either, though it matters, all is left as it was where any output changes. The network is in eval mode.
    """
    parameters = [stored(weight.owner, weight.attribute) for weight in weights.weights]
    biases = _biases(weights)
    told, before = _heard(context, [*parameters, *biases], samples)
    values = [parameter.detach().clone() for parameter in (*parameters, *biases)]
    with asked(context.model.module, []), torch.no_grad():
        for parameter, own in zip((*parameters, *biases), told, strict=True):
            parameter.masked_fill_(~own, 0.0)
        after = [context.model.module(*batch.inputs) for batch in _batches(context, samples)]
        same = all(torch.allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE) for a, b in zip(before, after, strict=True))
        if not same:
            for parameter, value in zip((*parameters, *biases), values, strict=True):
                parameter.copy_(value)
            return 0
    kept = weights.kept()
    dropped = [~mask | ~own for mask, own in zip(kept, told, strict=False)]
    count = sum(int((mask & gone).sum()) for mask, gone in zip(kept, dropped, strict=True))
    weights.drop(dropped)
    return count


def _biases(weights: WeightSet) -> list[nn.Parameter]:
    """Of the layers whose one weight is in the set."""
    found = []
    for weight in weights.weights:
        bias = weight.owner._parameters.get("bias")
        if weight.attribute == "weight" and bias is not None and bias.requires_grad:
            found.append(bias)
    return found


def _batches(context: Context, samples: int) -> Iterator[Batch]:
    order = torch.Generator().manual_seed(context.seed)
    for batch in fed(context.feed).batches("train", BATCH, shuffle=order, limit=samples):
        yield batch.to(context.device)


def _heard(context: Context, parameters: list[nn.Parameter], samples: int) -> tuple[list[Tensor], list[Tensor]]:
    """Where any output of any sample has a gradient, and the outputs."""
    module = context.model.module
    generator = torch.Generator().manual_seed(context.seed)
    heard = [torch.zeros_like(parameter, dtype=torch.bool) for parameter in parameters]
    given: list[Tensor] = []
    with asked(module, parameters):
        for batch in _batches(context, samples):
            outputs: Tensor = module(*batch.inputs)
            given.append(outputs.detach())
            directions = torch.randn(outputs.shape, generator=generator).to(outputs)
            gradients = torch.autograd.grad((outputs * directions).sum(), parameters, allow_unused=True)
            for own, gradient in zip(heard, gradients, strict=True):
                if gradient is not None:
                    own |= gradient != 0
    return heard, given
