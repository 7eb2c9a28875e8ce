"""Parameter groups: which weights decay, and how fast each layer learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from app.contract.training import Training
from worker.techniques.quantization.qat.lsq import Steps

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def groups(module: nn.Module, training: Training) -> list[dict[str, Any]]:
    """Trainable parameters as an optimizer's groups: `params`, `weight_decay`, and `scale`, the factor on the rate.

    Norms, biases and other weights of one dimension do not decay unless `decay_norms`, and steps of grids never do.
    With a `layer_decay` d, layer i of n (see `depths`) learns at d^(n - i) of the rate (Clark et al. 2020, ELECTRA; Bao
    et al. 2021, BEiT).
    """
    depth = depths(module) if training.layer_decay < 1 else {}
    top = max(depth.values(), default=0)
    plain = set(_steps(module)) if training.decay_norms else set(_undecayed(module))
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            decay = 0.0 if id(parameter) in plain else training.weight_decay
            scale = training.layer_decay ** (top - depth.get(id(parameter), top))
            found.setdefault((decay, scale), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "scale": scale} for (decay, scale), parameters in found.items()
    ]


def depths(module: nn.Module) -> dict[int, int]:
    """The layer, from 0 at the input, of every parameter by its id().

    Layers are counted in the order in which the network defines them. The blocks of a stack (ModuleList, Sequential)
    are a layer each, whatever is in them, and so is whatever stands beside stacks: embeddings, a head. Norms and what
    else has no weight of two dimensions belong to the layer below.
    """
    found: dict[int, int] = {}
    last = 0
    for block in _blocks(module):
        parameters = list(block.parameters())
        starts = any(parameter.dim() > 1 for parameter in parameters) and bool(found)
        last += starts
        for parameter in parameters:
            found.setdefault(id(parameter), last)
    for parameter in module.parameters():  # of a network that holds some of its own, beside its layers
        found.setdefault(id(parameter), 0)
    return found


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        stack = isinstance(child, nn.ModuleList | nn.Sequential)
        if next(child.parameters(), None) is None:
            continue
        # A block of a stack is not looked into; elsewhere, what holds a stack somewhere is.
        if stack or (not _is_stack(module) and any(_is_stack(inner) for inner in child.modules())):
            yield from _blocks(child)
        else:
            yield child


def _is_stack(module: nn.Module) -> bool:
    """Parametrizations are lists of modules too, but no layers."""
    return type(module) in (nn.ModuleList, nn.Sequential)


def _steps(module: nn.Module) -> Iterator[int]:
    """They are learned by their logarithm, of which zero is no smaller step but one of 1."""
    return (id(own) for layer in module.modules() if isinstance(layer, Steps) for own in layer.parameters())


def _undecayed(module: nn.Module) -> Iterator[int]:
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.dim() <= 1 or isinstance(layer, NORMS) or name.endswith("bias"):
                yield id(parameter)
