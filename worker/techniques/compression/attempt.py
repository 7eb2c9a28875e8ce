"""States that a search goes back to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from worker.constraints import bare
from worker.training.states import State, load_masks, load_module, mask_state, module_state


@dataclass(frozen=True)
class Snapshot:
    """Weights, masks and codebooks of a module, with tensors of their own."""

    module: State
    masks: State


@dataclass(frozen=True)
class Attempt:
    """What a round has come to: the metric (higher is better), the packed bytes, the state that has both, and how many
    values a codebook of it has at most."""

    metric: float
    size: int
    state: Snapshot
    entries: int


def snapshot(module: nn.Module) -> Snapshot:
    """The state of a module as it is."""
    return Snapshot(cloned(module_state(module)), cloned(mask_state(module)))


def restore(module: nn.Module, state: Snapshot, device: torch.device) -> None:
    """Puts the module back; constraints that came later are gone."""
    bare(module)
    load_masks(module, state.masks)
    load_module(module, state.module)
    module.to(device)


def cloned(state: State) -> State:
    """With tensors of its own: a file must not hold one memory twice."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
