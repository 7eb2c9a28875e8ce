"""What the parts of a training say of themselves for a checkpoint: tensors, and whatever JSON can hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from worker.constraints import Mask, Shared, codebooks, impose_codebook, impose_mask, masks
from worker.ranks.sharded import alike

State: TypeAlias = dict[str, Any]
"""Tensors and JSON values by name; one level deep. Who reads it has checked nothing but that it is one."""

_BEHIND_A_CONSTRAINT = re.compile(r"parametrizations\.([^.]+)\.(?:original|[0-9]+\.(entries))$")


class Unusable(Exception):
    """A checkpoint that cannot be read, or is not of this training."""


def trained(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything that training changes, parameters and running statistics, once each, by its plain name: as it is
    called without constraints. Masks and codes are not among it: they are imposed."""
    seen: set[int] = set()
    for prefix, layer in module.named_modules():
        if isinstance(layer, Mask):
            continue
        buffers = {} if isinstance(layer, Shared) else layer._buffers  # codes are imposed too
        for name, tensor in (*layer._parameters.items(), *buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield _plain(f"{prefix}.{name}".lstrip(".")), tensor


def _plain(name: str) -> str:
    """As it is called without constraints; the entries of a codebook have a name of their own."""
    return _BEHIND_A_CONSTRAINT.sub(lambda found: found[1] + (f".{found[2]}" if found[2] else ""), name)


def module_state(module: nn.Module) -> State:
    """The trained tensors of a module; as they are, not copied."""
    return {name: tensor.detach() for name, tensor in trained(module)}


def load_module(module: nn.Module, state: State) -> None:
    """Puts the values into the module. Raises Unusable, before anything is changed, where they are another's."""
    into = dict(trained(module))
    check_alike(into, state)
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(alike(state[name], tensor))


def mask_state(module: nn.Module) -> State:
    """The masks and codebooks on a module, and the order in which masks come: parameters are listed in it."""
    imposed, shared = masks(module), codebooks(module)
    found: State = {"order": list(imposed), **{f"mask.{name}": mask for name, mask in imposed.items()}}
    for name, own in shared.items():
        found |= {f"codes.{name}": own.codes, f"entries.{name}": own.entries.detach().clone()}
    return found | {"codebooks": list(shared), "straight": [name for name, own in shared.items() if own.straight]}


def load_masks(module: nn.Module, state: State) -> None:
    """Imposes just these masks, and these codebooks. A mask that the module has beyond them keeps all from now on.

    Raises Unusable where a mask fits no weight.
    """
    _load_plain_masks(module, state)
    for name in state.get("codebooks", ()):
        try:
            own = impose_codebook(module, name, state[f"codes.{name}"], state[f"entries.{name}"][1:])
            own.straight = name in state["straight"]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Unusable(f"the codebook of {name} fits no weight") from error


def _load_plain_masks(module: nn.Module, state: State) -> None:
    order = list(state.get("order", ()))
    held = masks(module)
    if list(held) == order and all(_equal(mask, state.get(f"mask.{name}")) for name, mask in held.items()):
        return
    for name, imposed in masks(module).items():
        if name not in order:
            imposed.fill_(True)
    for name in order:
        try:
            mask = state[f"mask.{name}"]
            impose_mask(module, name, torch.ones_like(mask))
            masks(module)[name].copy_(mask)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Unusable(f"the mask of {name} fits no weight") from error


def _equal(mask: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and mask.shape == other.shape and torch.equal(mask, other.to(mask.device))


def check_alike(into: dict[str, Tensor], state: State) -> None:
    """Raises Unusable unless both hold the same tensors by name, shape and dtype."""
    for name, tensor in into.items():
        found = state.get(name)
        if not isinstance(found, Tensor) or found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise Unusable(f"it has nothing for {name}")
    if len(into) != len(state):
        raise Unusable("it is of another network")
