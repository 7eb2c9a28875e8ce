"""How the weights of convolutions lie in memory while a network trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from worker.data.batch import Inputs

PLANES = 4  # dimensions of a convolution's weight over pictures


@contextmanager
def channels_last(module: nn.Module, example: Inputs) -> Iterator[None]:
    """Within it the weights of convolutions over pictures have their channels last, and so has what they give.

    On a CPU, pooling and convolutions are up to twice as fast so. The values are the same, and sums are added in
    another order. A network that cannot work so, since it looks at tensors by their strides (`view`), is left as it is:
    `example` is what it is tried on.
    """
    if not any(isinstance(layer, nn.Conv2d) for layer in module.modules()):
        yield
        return
    _lay(module, torch.channels_last)
    if not _works(module, example):
        _lay(module, torch.contiguous_format)
    try:
        yield
    finally:
        _lay(module, torch.contiguous_format)


def _lay(module: nn.Module, layout: torch.memory_format) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == PLANES:
            # Not `contiguous`: with one channel both layouts are, and it would leave the strides as they are.
            tensor.data = tensor.data.to(memory_format=layout)


def _works(module: nn.Module, example: Inputs) -> bool:
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            module(*example)
    except RuntimeError:
        return False
    finally:
        module.train(was_training)
    return True
