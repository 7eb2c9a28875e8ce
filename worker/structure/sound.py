"""Which groups may lose units: the code of some networks counts on what they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from worker.constraints import baked
from worker.data.batch import Inputs
from worker.structure.groups import Group, Structure, structure_of
from worker.structure.narrowing import Entries, Kept, left, narrow, narrowed


def standing(module: nn.Module, inputs: Inputs, structure: Structure) -> tuple[list[Group], dict[str, str]]:
    """The groups without a unit of which the network runs, and hangs together as before; of the others, by name, why
    not. One of each kind is tried, on a copy."""
    found: dict[str, str | None] = {}
    for group in structure.groups:
        if group.kind not in found:
            found[group.kind] = _trouble(module, inputs, structure, group)
    why = {group.name: reason for group in structure.groups if (reason := found[group.kind]) is not None}
    return [group for group in structure.groups if group.name not in why], why


def without(
    module: nn.Module, structure: Structure, groups: Sequence[Group], kept: Kept
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy with what is kept of the groups, and what was done to it as an edit."""
    entries = left(structure, groups, kept)
    edit = narrowed(module, structure, groups, kept, entries)
    made = baked(module)
    narrow(made, entries, edit)
    return made, edit


def hangs_together(structure: Structure, entries: Entries, other: Structure) -> bool:
    """Whether what is left of a network's parts belongs together as it did before: code that reshapes by numbers of its
    own may run and put channels elsewhere."""
    before, after = [], []
    for key, own in structure.classes.items():
        kept = own if key not in entries else own[entries[key]]
        if len(kept) != len(other.classes.get(key, ())):
            return False
        if len(kept) > 1:  # what is one meets all, and says nothing
            before.append(kept.numpy())
            after.append(other.classes[key].numpy())
    pairs = np.unique(np.stack([np.concatenate(before), np.concatenate(after)]), axis=1)
    return all(len(np.unique(side)) == pairs.shape[1] for side in pairs)


def _trouble(module: nn.Module, inputs: Inputs, structure: Structure, group: Group) -> str | None:
    kept = {group.name: torch.arange(group.units - 1)}
    entries = left(structure, [group], kept)
    made, _ = without(module, structure, [group], kept)
    try:
        other = structure_of(made, inputs)
    except Exception as error:  # models raise errors of every class
        return f"without a unit of it the network does not run: {str(error).splitlines()[0][:200]}"
    if group.units > 2 and not hangs_together(structure, entries, other):
        return "without a unit of it the network computes something else"
    return None
