"""How the weights of convolutions lie in memory while a network trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from worker.constraints import stored
from worker.data.batch import Inputs


@contextmanager
def channels_last(module: nn.Module, example: Inputs) -> Iterator[None]:
    """Within it the weights of convolutions over pictures have their channels last, and so has what they give.

    On a CPU, pooling and convolutions are up to twice as fast so. The values are the same, and sums are added in
    another order. A network that cannot work so, since it looks at tensors by their strides (`view`), is left as it is:
    it is tried on `example`, forth and back, as it trains.
    """
    weights = _kernels(module)
    try:
        _lay(weights, torch.channels_last)
        if weights and not _works(module, example):
            _lay(weights, torch.contiguous_format)
        yield
    finally:
        _lay(weights, torch.contiguous_format)


def _kernels(module: nn.Module) -> list[nn.Parameter]:
    """The weights of convolutions, behind masks too; not such as share their memory with something else."""
    weights: dict[int, nn.Parameter] = {}
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            with suppress(AttributeError):  # of a weight that is computed from others
                weight = stored(layer, "weight")
                weights[id(weight)] = weight
    return [weight for weight in weights.values() if weight.untyped_storage().nbytes() == weight.nbytes]


def _lay(weights: list[nn.Parameter], layout: torch.memory_format) -> None:
    for weight in weights:
        # Not `contiguous`: a weight of one channel is so in both layouts, and would keep its strides.
        weight.data = torch.empty_like(weight.data, memory_format=layout).copy_(weight.data)


def _works(module: nn.Module, example: Inputs) -> bool:
    """Whether a pass forth and, if anything is trained, back goes through; it leaves nothing behind."""
    modes = {layer: layer.training for layer in module.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    trained = any(parameter.requires_grad for parameter in module.parameters())
    module.train(trained)
    try:
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(trained):
            output: Tensor = module(*example)
            if trained:
                output.float().sum().backward()
    except Exception:  # whatever a network raises that cannot have it
        return False
    finally:
        for layer, mode in modes.items():
            layer.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return True
