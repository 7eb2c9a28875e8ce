"""What the loss says of weights: its gradients on a part of the training data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from worker.constraints import stored
from worker.context import Context
from worker.data.batch import Batch
from worker.techniques.pruning.weights import PrunableWeight
from worker.training.loop import fed

BATCH = 32


def mean_gradients(context: Context, weights: list[PrunableWeight], samples: int) -> list[Tensor]:
    """The gradient of the mean loss over `samples` of the training data, for each weight, in eval mode.

    Zero where a mask holds. Raises DatasetMismatch without labelled training data.
    """
    return _summed(context, weights, samples, BATCH, lambda gradient, size: gradient * size)


def mean_squares(context: Context, weights: list[PrunableWeight], samples: int) -> list[Tensor]:
    """The mean over samples of the squared gradient of a sample's loss: the diagonal of the empirical Fisher matrix."""
    return _summed(context, weights, samples, 1, lambda gradient, size: gradient.square())


@contextmanager
def asked(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Meanwhile the module is in eval mode, and even what is not trained has gradients."""
    training, frozen = module.training, [one for one in parameters if not one.requires_grad]
    module.eval()
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        module.train(training)
        for parameter in frozen:
            parameter.requires_grad_(False)


def _summed(
    context: Context, weights: list[PrunableWeight], samples: int, batch: int, part: Callable[[Tensor, int], Tensor]
) -> list[Tensor]:
    feed, module = fed(context.feed), context.model.module
    parameters = [stored(weight.owner, weight.attribute) for weight in weights]
    found = [torch.zeros_like(parameter) for parameter in parameters]
    order = torch.Generator().manual_seed(context.seed)
    noise = torch.Generator().manual_seed(context.seed)
    seen = 0
    with asked(module, parameters):
        for one in feed.batches("train", batch, shuffle=order, limit=samples):
            own: Batch = feed.task.prepare(one, noise).to(context.device)
            loss = feed.task.loss(module(*own.inputs), own)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            seen += len(own)
            for total, gradient in zip(found, gradients, strict=True):
                if gradient is not None:
                    total += part(gradient, len(own))
    return [total / seen for total in found]
