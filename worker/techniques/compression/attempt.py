"""States that a search goes back to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from worker.constraints import bare
from worker.structure.narrowing import Entries
from worker.training.states import State, load_masks, load_module, mask_state, module_state


@dataclass(frozen=True)
class Snapshot:
    """Weights, masks and codebooks of a module, with tensors of their own."""

    module: State
    masks: State

    def narrowed(self, entries: Entries) -> Snapshot:
        """With these entries alone of weights, of their masks and of the codes of what they share."""
        return Snapshot(_left(self.module, entries, ("",)), _left(self.masks, entries, ("mask.", "codes.")))


@dataclass(frozen=True)
class Attempt:
    """What a round has come to: the metric (higher is better), the packed bytes, the state that has both, the network
    as it is packed (on the CPU), and how many values a codebook of it has at most."""

    metric: float
    size: int
    state: Snapshot
    module: nn.Module
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


def _left(state: State, entries: Entries, prefixes: tuple[str, ...]) -> State:
    """The state with these entries alone of the tensors that are called as their keys, behind one of the prefixes."""
    found = dict(state)
    for (name, dim), own in entries.items():
        for key in (f"{prefix}{name}" for prefix in prefixes if f"{prefix}{name}" in found):
            found[key] = found[key].index_select(dim, own.to(found[key].device))
    return found
