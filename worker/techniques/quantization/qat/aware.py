"""Quantization-aware training: grids that are good to begin with, a training that rounds, and what it leaves.

Batch norms need no folding while it trains. A weight has a step for each output, so that the factor with which a norm
is folded into it later goes into the step, and the codes stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from app.contract.qat import Qat
from app.contract.spec import as_static
from worker.constraints import impose_rounding, owners, release_roundings, stored
from worker.context import Context
from worker.model import Model
from worker.techniques.base import Details
from worker.techniques.pruning.inputs import matrix, takes_columns, unmatrix
from worker.techniques.pruning.weights import (
    PrunableWeight,
    WeightSet,
    is_transformers_conv1d,
    matches,
    prunable,
    select,
)
from worker.techniques.quantization.grid_math import Grid, least_squares, limits
from worker.techniques.quantization.groups import group_of, nearest
from worker.techniques.quantization.onnx_int8 import activation_type
from worker.techniques.quantization.qat import inputs
from worker.techniques.quantization.qat.lsq import FakeQuantized
from worker.techniques.quantization.weight_grid import WeightGrid
from worker.techniques.quantization.weight_only import Row, sqnr
from worker.training.finding.settle import settle
from worker.training.loop import train


def applies(step: Qat, model: Model) -> str | None:
    """None, or why no weight of the model is for it. Raises InvalidSpec for patterns that match nothing."""
    if not model.facts.trainable:
        return model.facts.untrainable_reason
    if not any(_takes(step, weight.owner) for weight in prunable(model.module)):
        return "Quantization-aware training is for Linear and convolution layers that torch computes; there are none."
    if not _chosen(step, model.module):
        return "exclude leaves no layer to quantize."
    return None


def train_quantized(step: Qat, context: Context) -> Details:
    """Trains with weights, and for 8 bits what comes into their layers, rounded. Masks hold.

    Weights are left on their grids, which the context has, and for 8 bits the ranges of inputs, for the exporter.
    Raises what `train` does, and InvalidSpec where what comes into a layer is not finite.
    """
    module = context.model.module
    weights = _chosen(step, module)
    sharing = [_readers(step, module, weight) for weight in weights]
    layers = {name: layer for own in sharing for name, layer in own.items()}
    found = inputs.ranges(step, context, layers, [list(own) for own in sharing]) if step.in_file else {}
    made = inputs.fake_inputs(step, found)
    grids = {weight.name: _impose(step, context, weight) for weight in weights}
    with inputs.rounding(layers, made):
        training, told = settle(context, step.training)
        told |= train(context, training).details()
    release_roundings(module)
    noise = {weight.name: _settled(step, context, weight, grids[weight.name]) for weight in weights}
    if step.in_file:
        context.quantization = as_static(step)
        context.ranges.update({f"{name}.weight".lstrip("."): own for name, own in inputs.learned(made).items()})
    details: Details = {"method": step.method, "bits": step.bits, "steps": step.steps}
    details["layers"] = [_row(weight, context, noise[weight.name]) for weight in weights]
    return details | _others(step, module, grids) | told


def _takes(step: Qat, layer: nn.Module) -> bool:
    if not step.in_file:
        return takes_columns(layer)
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_transformers_conv1d(layer)


def _chosen(step: Qat, module: nn.Module) -> list[PrunableWeight]:
    return [weight for weight in select(module, step.exclude) if _takes(step, weight.owner)]


def _readers(step: Qat, module: nn.Module, weight: PrunableWeight) -> dict[str, nn.Module]:
    """The layers, by name, that multiply what comes in by a weight; several where it is tied."""
    sharing = owners(module, stored(weight.owner, weight.attribute))
    return {name: layer for name, layer, _ in sharing if _takes(step, layer)}


def _bits(step: Qat) -> int:
    """Those of weights, of which one is lost to uint8 activations."""
    return step.bits - (step.in_file and activation_type(step.activations) == "uint8")


def _symmetric(step: Qat) -> bool:
    """Whether zero is the middle of the grid, as it always is with 8 bits."""
    return step.in_file or step.symmetric


def _limits(step: Qat) -> tuple[int, int]:
    """The least code and the greatest. Of 8 bits as many lie below zero as above: a norm may turn the sign."""
    low, high = limits(_bits(step), _symmetric(step))
    return (-high, high) if step.in_file else (low, high)


def _impose(step: Qat, context: Context, weight: PrunableWeight) -> FakeQuantized:
    """Begins with the grids that have the least squared error."""
    value = matrix(weight, weight.value()).detach().float()
    columns = value.shape[1]
    group = columns if step.in_file else group_of(step, weight.owner, columns)
    _, steps, zeros = nearest(value, group, lambda parts: least_squares(parts, _bits(step), _symmetric(step)))
    own = FakeQuantized(
        *_as_the_others(value, steps, zeros),
        *_limits(step),
        groups=columns // group,
        inputs_first=is_transformers_conv1d(weight.owner),
        fixed=step.steps == "fixed",
    )
    impose_rounding(context.model.module, weight.name, own.to(value.device))
    return own


def _as_the_others(value: Tensor, steps: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Steps and zero points [outputs, groups], where a group of nothing but zeros has those in the middle of the
    others': with a step of any size, all that it comes to hold could be rounded to zero."""
    alive = value.reshape(*steps.shape, -1).any(2)
    if not alive.any():
        return steps, zeros
    return torch.where(alive, steps, steps[alive].median()), torch.where(alive, zeros, zeros[alive].median())


def _settled(step: Qat, context: Context, weight: PrunableWeight, own: FakeQuantized) -> float | None:
    """Rounds the weight for good, with steps that the upload's dtype can hold, and notes the grids; the signal to noise
    of that, in decibels."""
    parameter = stored(weight.owner, weight.attribute)
    kept = torch.where(WeightSet(context.model.module, [weight]).kept()[0], parameter.detach(), 0.0)
    rows = matrix(weight, kept).float()
    steps = own.log_step.detach().exp()[:, None]
    dtype = context.model.stored.get(weight.name, torch.float32)
    grid = Grid(steps, own.zero[:, None], own.low, own.high).held_in(dtype)
    values = grid.rounded(rows.reshape(len(steps), -1)).view_as(rows)
    with torch.no_grad():
        parameter.copy_(unmatrix(weight, values))
    shape = (len(rows), own.groups)
    found, zeros = grid.step.view(shape).cpu(), grid.zero.view(shape).cpu()
    context.grids[weight.name] = WeightGrid(step.bits, rows.shape[1] // own.groups, _symmetric(step), found, zeros)
    return sqnr(rows, values)


def _others(step: Qat, module: nn.Module, trained: Collection[str]) -> Details:
    """The weights that did not train: with 8 bits most of them are rounded when the file is made, as static does."""
    floats: list[Row] = []
    rounded: list[Row] = []
    for weight in prunable(module):
        if weight.name not in trained:
            own = floats if _stays_float(step, weight) else rounded
            own.append({"name": weight.name, "weights": weight.value().numel()})
    found: Details = {"layers_left_in_float": floats}
    return found | {"layers_not_trained": rounded} if step.in_file else found


def _stays_float(step: Qat, weight: PrunableWeight) -> bool:
    """Whether a weight that did not train does. The runtime has no recurrent layers of integers."""
    excluded = any(matches(weight, pattern) for pattern in step.exclude)
    return not step.in_file or excluded or isinstance(weight.owner, nn.RNNBase)


def _row(weight: PrunableWeight, context: Context, noise: float | None) -> Row:
    grid, given = context.grids[weight.name], context.ranges.get(weight.name)
    row: Row = {"name": weight.name, "weights": weight.value().numel(), "bits": grid.bits, "group": grid.group}
    row["sqnr_db"] = noise
    return row if given is None else row | {"input_low": given.low, "input_high": given.high}
