"""What each unit of a group is worth, by the weights that hang on it and by data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from app.contract.errors import InvalidSpec
from app.contract.widths import TakesUnits
from worker.context import Context
from worker.structure.groups import Cut, Group
from worker.techniques.pruning.gradients import asked
from worker.techniques.pruning.samples import calibration
from worker.techniques.pruning.weights import is_transformers_conv1d
from worker.training.loop import fed

INPUTS_BATCH = 32


def scores(step: TakesUnits, context: Context, groups: Sequence[Group]) -> dict[str, Tensor]:
    """By the group's name, float64 [units]. Raises DatasetMismatch where the criterion has no data, InvalidSpec for
    bn_scale where there is no batch norm."""
    tensors = dict(context.model.module.named_parameters())
    match step.criterion:
        case "l1":
            return {group.name: norms(group, tensors, 1) for group in groups}
        case "l2":
            return {group.name: norms(group, tensors, 2) for group in groups}
        case "fpgm":
            return {group.name: distances(group, tensors) for group in groups}
        case "bn_scale":
            return _scales(context.model.module, groups)
        case "random":
            generator = torch.Generator().manual_seed(context.seed)
            return {group.name: torch.rand(group.units, generator=generator, dtype=torch.float64) for group in groups}
        case "activations":
            return _by_inputs(step, context, groups)
        case _:
            return _by_gradients(step, context, groups)


def by_unit(cut: Cut, tensor: Tensor) -> Tensor:
    """[units, all that is a unit's] of a tensor of the parameter's shape."""
    taken = tensor.detach().index_select(cut.dim, cut.places.reshape(-1).to(tensor.device)).movedim(cut.dim, 0)
    return taken.reshape(cut.places.shape[0], -1)


def norms(group: Group, tensors: Mapping[str, Tensor], order: int) -> Tensor:
    """Of all weights of products that hang on a unit, those that make it and those that read it."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for cut in group.cuts:
        if (tensor := tensors.get(cut.parameter)) is not None and tensor.ndim > 1:
            total += by_unit(cut, tensor).double().abs().pow(order).sum(1).cpu()
    return total.pow(1 / order)


def distances(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """How far the weights that make a unit are from those of the others, summed: those near the geometric median are
    told by the others (He et al. 2019)."""
    weights = {cut: tensors.get(cut.parameter) for cut in group.cuts if cut.made}
    made = [by_unit(cut, own) for cut, own in weights.items() if own is not None and own.ndim > 1]
    rows = torch.cat(made, 1).double().cpu()
    return torch.cdist(rows, rows).sum(1)


def _scales(module: nn.Module, groups: Sequence[Group]) -> dict[str, Tensor]:
    """The absolute factors of batch norms, summed over those that a unit passes; groups without one are left out."""
    norms_of = {
        f"{path}.weight".lstrip("."): layer.weight
        for path, layer in module.named_modules()
        if isinstance(layer, _NormBase) and layer.weight is not None
    }
    found = {}
    for group in groups:
        own = [by_unit(cut, norms_of[cut.parameter]) for cut in group.cuts if cut.parameter in norms_of]
        if own:
            found[group.name] = torch.cat(own, 1).double().abs().sum(1).cpu()
    if not found:
        raise InvalidSpec("bn_scale looks at factors of batch norms, and no unit passes one. Give another criterion.")
    return found


def _by_gradients(step: TakesUnits, context: Context, groups: Sequence[Group]) -> dict[str, Tensor]:
    """By how much a sample's loss changes, to first order, where nobody reads a unit any more: the sum of weight times
    gradient over those that read it, which is the gradient of a factor in front of them. The mean over samples of its
    size (taylor), or of its square (fisher)."""
    feed, module = fed(context.feed), context.model.module
    tensors = dict(module.named_parameters())
    names = list(dict.fromkeys(cut.parameter for group in groups for cut in group.cuts if not cut.made))
    parameters = [tensors[name] for name in names]
    order = 2 if step.criterion == "fisher" else 1
    totals = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    shuffle, noise = (torch.Generator().manual_seed(context.seed) for _ in range(2))
    with asked(module, parameters):
        for one in feed.batches("train", 1, shuffle=shuffle, limit=step.samples):
            batch = feed.task.prepare(one, noise).to(context.device)
            loss = feed.task.loss(module(*batch.inputs), batch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            told = {name: own for name, own in zip(names, gradients, strict=True) if own is not None}
            for group in groups:
                totals[group.name] += _change(group, tensors, told).abs().pow(order)
    return totals


def _change(group: Group, tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros(group.units, dtype=torch.float64)
    for cut in group.cuts:
        if not cut.made and cut.parameter in gradients:
            total += by_unit(cut, tensors[cut.parameter].detach() * gradients[cut.parameter]).double().sum(1).cpu()
    return total


def _by_inputs(step: TakesUnits, context: Context, groups: Sequence[Group]) -> dict[str, Tensor]:
    """For each layer that reads a unit the root of the summed squares of what comes in times the norm of the weights
    that it is read by; layers that do not compute plainly count with the weights alone."""
    module, tensors = context.model.module, dict(context.model.module.named_parameters())
    names = {cut.parameter for group in groups for cut in group.cuts if not cut.made}
    layers = {name: module.get_submodule(name.rpartition(".")[0]) for name in sorted(names)}
    squares = _squares({name: own for name, own in layers.items() if _sees_channels(own)}, step, context)
    found = {}
    for group in groups:
        total = torch.zeros(group.units, dtype=torch.float64)
        for cut in group.cuts:
            if cut.made:
                continue
            weights = _entries(cut, tensors[cut.parameter])
            came = squares.get(cut.parameter)
            came = torch.ones(1, dtype=torch.float64) if came is None or len(came) < cut.places.max() + 1 else came
            came = came[cut.places] if len(came) > 1 else came
            total += (weights * came).sum(1)
        found[group.name] = total.sqrt()
    return found


def _entries(cut: Cut, tensor: Tensor) -> Tensor:
    """[units, entries of each]: the squared norm of the weights at each."""
    taken = tensor.detach().index_select(cut.dim, cut.places.reshape(-1).to(tensor.device)).movedim(cut.dim, 0)
    return taken.double().square().flatten(1).sum(1).reshape(cut.places.shape).cpu()


def _sees_channels(layer: nn.Module) -> bool:
    plain = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1
    return plain or isinstance(layer, nn.Linear) or is_transformers_conv1d(layer)


def _squares(layers: Mapping[str, nn.Module], step: TakesUnits, context: Context) -> dict[str, Tensor]:
    """The mean of the squares of what comes into each, by channel."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def hook(name: str) -> Any:
        def see(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].detach()
            rows = rows.movedim(1, -1) if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else rows
            rows = rows.reshape(-1, rows.shape[-1]).double()
            sums[name] = sums.get(name, 0) + rows.square().sum(0).cpu()
            counts[name] += len(rows)

        return see

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    module = context.model.module
    training = module.training
    try:
        with torch.no_grad():
            module.eval()
            for batch in calibration(context, INPUTS_BATCH, step.samples, "Criterion activations looks at inputs"):
                module(*batch.inputs)
    finally:
        module.train(training)
        for one in hooks:
            one.remove()
    return {name: own / counts[name] for name, own in sums.items()}
