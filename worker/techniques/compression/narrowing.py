"""Units that a sparse network has no use for: they leave it, and the states that a search goes back to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from worker.constraints import baked
from worker.context import Context
from worker.data.batch import Inputs
from worker.export.packed import stored_state
from worker.loading.architecture import ArchitecturePlan
from worker.model import Model
from worker.packed import packed
from worker.structure.calls import example_on
from worker.structure.edits import Edit
from worker.structure.fusing.judging import Judge, looked_at, samples_of
from worker.structure.groups import Group, Structure
from worker.structure.narrowing import Entries, Kept, left
from worker.structure.sound import is_normed, standing, without
from worker.techniques.compression.attempt import Attempt
from worker.techniques.pruning.weights import prunable, select
from worker.techniques.structure.structured import EXAMPLES, structure_in

SAMPLES = 64  # of the job's data, with which outputs are compared


@dataclass(frozen=True)
class Narrowing:
    """The pruned network without its dead units, free of masks, and how it came about: as an edit, and as what stays
    of each parameter. `units` are those that each group had, `kept` those that stay of some, and `size` the packed
    bytes of the attempt without them."""

    module: nn.Module
    edit: Edit
    entries: Entries
    units: dict[str, int]
    kept: dict[str, int]
    size: int


def rewritable(model: Model) -> bool:
    """Whether a network of any widths can be written as the upload was: the config of a folder of transformers has one
    for all layers, and a graph may compute in narrower floats."""
    if isinstance(model.plan, ArchitecturePlan):
        return True
    of_graph = model.facts.format in ("pt2", "onnx") and model.facts.trainable
    return of_graph and all(dtype == torch.float32 for dtype in model.stored.values())


def narrowing(context: Context, exclude: tuple[str, ...], attempt: Attempt) -> Narrowing | None:
    """What leaves both the context's network and the attempt's, which come of the same round; None where nothing does,
    or the file would be larger.

    Layers that `exclude` names keep all that they have. Both networks have to give what they gave. The network is
    `rewritable`.
    """
    model = replace(context.model, module=baked(context.model.module).cpu())
    structure = structure_in(model)
    groups = _free(model.module, structure, exclude)
    inputs = [*looked_at(model), *samples_of(context.feed, SAMPLES)]
    for silent in (True, False):  # behind some activations what nothing is in front of does something
        kept = _kept(groups, (model.module, attempt.module), silent)
        own = _standing(model, structure, [group for group in groups if group.name in kept])
        if not own:
            continue
        module, edit = without(model.module, structure, own, kept)
        coded, _ = without(attempt.module, structure, own, kept)
        if not (_gives_the_same(model.module, module, inputs) and _gives_the_same(attempt.module, coded, inputs)):
            continue
        size = len(packed(stored_state(coded, model))[0])
        units = {group.name: group.units for group in structure.groups}
        stay = {group.name: len(kept[group.name]) for group in own}
        return None if size > attempt.size else Narrowing(module, edit, left(structure, own, kept), units, stay, size)
    return None


def dead(module: nn.Module, group: Group, silent: bool) -> Tensor:
    """Which units (bool, [units]) nothing reads: all weights that would are zero. With `silent` those that nothing
    makes too: all weights and biases that would are zero."""
    tensors = dict(module.named_parameters())  # statistics that run along make nothing
    heard = {made: torch.zeros(group.units, dtype=torch.bool) for made in (True, False)}
    for cut in group.cuts:
        if (tensor := tensors.get(cut.parameter)) is not None:
            rows = (tensor.detach() != 0).movedim(cut.dim, 0).reshape(tensor.shape[cut.dim], -1).any(1)
            heard[cut.made] |= rows[cut.places].any(1)
    return ~heard[False] | ~heard[True] if silent else ~heard[False]


def _free(module: nn.Module, structure: Structure, exclude: tuple[str, ...]) -> list[Group]:
    """Groups that hang on no layer that is excluded, and on no norm over units, which looks at dead ones too."""
    excluded = {weight.name for weight in prunable(module)} - {weight.name for weight in select(module, exclude)}
    return [
        group
        for group in structure.groups
        if not is_normed(module, group) and not any(cut.parameter in excluded for cut in group.cuts)
    ]


def _kept(groups: Sequence[Group], modules: Sequence[nn.Module], silent: bool) -> Kept:
    """What stays of groups of which units are dead in all of the modules: one at least."""
    found = {}
    for group in groups:
        gone = torch.stack([dead(module, group, silent) for module in modules]).all(0)
        gone[0] &= not gone.all()
        if gone.any():
            found[group.name] = (~gone).nonzero().flatten()
    return found


def _standing(model: Model, structure: Structure, groups: Sequence[Group]) -> list[Group]:
    """Those of the groups that the network's code lets lose units."""
    if not groups:
        return []
    inputs = example_on(model.module, model, EXAMPLES)
    return standing(model.module, inputs, replace(structure, groups=tuple(groups)))[0]


def _gives_the_same(module: nn.Module, other: nn.Module, inputs: Sequence[Inputs]) -> bool:
    judge = Judge(module, inputs)
    return judge.gap(other) <= judge.most
