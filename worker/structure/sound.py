"""Which groups may lose units: the code of some networks counts on what they have, or on where it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from worker.constraints import baked
from worker.data.batch import Inputs
from worker.structure.groups import Group, Structure, structure_of
from worker.structure.narrowing import Entries, Kept, left, narrow, narrowed

TOLERANCE = 1e-3  # of outputs, relative to the largest: sums in another order


def standing(module: nn.Module, inputs: Inputs, structure: Structure) -> tuple[list[Group], dict[str, str]]:
    """The groups without units of which the network runs, and computes what it did; of the others, by name, why not.
    One of each kind is tried, on copies."""
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
    """Units that change places change nothing; a part of them leaves, and then all but one."""
    usual = _outputs(module, inputs)
    order = torch.randperm(group.units, generator=torch.Generator().manual_seed(0))
    if not _alike(_outputs(_changed(module, group, lambda cut, rows: rows[order]), inputs), usual):
        return "what the network computes depends on the places of its units"
    for count in dict.fromkeys((max(1, group.units // 2), 1)):
        kept = {group.name: order[:count].sort().values}
        try:
            made, _ = without(module, structure, [group], kept)
            given = _outputs(made, inputs)
            other = structure_of(made, inputs)
        except Exception as error:  # models raise errors of every class
            return f"without some of its units the network does not run: {str(error).splitlines()[0][:200]}"
        unread = _outputs(_unread(module, group, order[count:]), inputs)
        if _alike(given, unread):
            continue
        # A norm over the units, or something else that looks at all of them, may be the reason; of one unit, which
        # meets all, labels say nothing.
        if count == 1 and given.shape == usual.shape and (group.units > 2 or is_normed(module, group)):
            continue
        if given.shape != usual.shape or not hangs_together(structure, left(structure, [group], kept), other):
            return "without some of its units the network computes something else"
    return None


def is_normed(module: nn.Module, group: Group) -> bool:
    """Whether a norm has factors for the units: one over all of them, since those of batches are each unit's own."""
    layers = [module.get_submodule(cut.parameter.rpartition(".")[0]) for cut in group.cuts]
    return any("Norm" in type(layer).__name__ and not isinstance(layer, _NormBase) for layer in layers)


def _outputs(module: nn.Module, inputs: Inputs) -> Tensor:
    training = module.training
    try:
        with torch.no_grad():
            given: Tensor = module.eval()(*inputs)
    finally:
        module.train(training)
    return given


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    most = float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * max(most, 1e-6))


def _changed(module: nn.Module, group: Group, change: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """A copy in which all that hangs on the units, [units, entries of each, …] by cut, is something else."""
    made = copy.deepcopy(module)
    tensors = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    with torch.no_grad():
        for cut in group.cuts:
            tensor = tensors[cut.parameter]
            places = cut.places.to(tensor.device)
            rows = tensor.index_select(cut.dim, places.reshape(-1)).movedim(cut.dim, 0).unflatten(0, places.shape)
            rows = change(cut, rows).flatten(0, 1).movedim(0, cut.dim)
            tensor.index_copy_(cut.dim, places.reshape(-1), rows)
    return made


def _unread(module: nn.Module, group: Group, gone: Tensor) -> nn.Module:
    """A copy in which nobody reads some of the units."""

    def silenced(cut: Any, rows: Tensor) -> Tensor:
        return rows if cut.made else rows.index_fill(0, gone.to(rows.device), 0.0)

    return _changed(module, group, silenced)
