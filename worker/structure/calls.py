"""Which layers a network calls: of some it takes the weights from under them, as torch's own attention does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from worker.data.batch import Inputs
from worker.model import Model


def computes_as(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the layer is of one of torch's kinds and computes as that does: some networks have layers that scale what
    they give, or are given something else."""
    return any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in kinds)


def example_on(module: nn.Module, model: Model, batch: int) -> Inputs:
    """Inputs of the model where a module of its structure, or one that takes its place, lies."""
    device = device_of(module)
    return tuple(tensor.to(device) for tensor in model.example(batch))


def device_of(module: nn.Module) -> torch.device:
    """Where the module lies; the CPU for one that holds nothing."""
    tensor = next(iter((*module.parameters(), *module.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device


def called_layers(model: Model, layers: Sequence[nn.Module]) -> set[nn.Module]:
    """Those of the layers that a pass of the network calls, with one tensor and by its place."""
    found: set[nn.Module] = set()

    def see(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if len(given) == 1 and not named:
            found.add(layer)

    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    training = model.module.training
    try:
        with torch.no_grad():
            model.module.eval()(*example_on(model.module, model, 2))
    finally:
        model.module.train(training)
        for hook in hooks:
            hook.remove()
    return found
