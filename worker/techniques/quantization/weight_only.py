"""Weight-only quantization: the weights of a layer come to lie on grids of few bits, and stay where they are.

The module holds what the numbers stand for, in floats, and the context their grids, for exporters that store codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from app.contract.weight_only import LEAST_GROUP, WeightOnly
from worker.constraints import stored
from worker.context import Context
from worker.model import Model
from worker.techniques.base import Details
from worker.techniques.pruning.by_inputs import finite, through
from worker.techniques.pruning.inputs import Moments, matrix, takes_columns, unmatrix
from worker.techniques.pruning.weights import PrunableWeight, WeightSet, prunable, select
from worker.techniques.quantization import gptq_math
from worker.techniques.quantization.grid_math import Grid, least_squares
from worker.techniques.quantization.weight_grid import WeightGrid


def applies(step: WeightOnly, model: Model) -> str | None:
    """None, or why no weight of the model is for it. Raises InvalidSpec for patterns that match nothing."""
    if not any(takes_columns(weight.owner) for weight in prunable(model.module)):
        return "Weight-only quantization is for Linear, Conv1d and Conv2d layers that torch computes; there are none."
    if not _chosen(step, model.module):
        return "exclude leaves no layer to quantize."
    return None


def quantize_weights(step: WeightOnly, context: Context) -> Details:
    """Moves the weights to their grids. Masks hold: a pruned weight is the code of zero.

    Raises DatasetMismatch where gptq has no data, InvalidSpec where a layer's inputs are not finite.
    """
    module = context.model.module
    weights = WeightSet(module, _chosen(step, module))
    rows: dict[str, dict[str, float | int | str | None]] = {}
    found: Details = {
        "method": step.method,
        "bits": step.bits,
        "algorithm": step.algorithm,
        "symmetric": step.symmetric,
    }
    if step.algorithm == "gptq":

        def visit(weight: PrunableWeight, moments: Moments) -> None:
            rows[weight.name] = _quantize(step, context, weight, finite(moments, weight, "gptq"))

        found |= context.ranks.told(
            lambda: through(context, weights, step.samples, "gptq looks at inputs", True, visit)
        )
        context.ranks.alike(parameter.data for parameter in module.parameters())
    else:
        for weight in weights.weights:
            rows[weight.name] = _quantize(step, context, weight, None)
    left = [weight for weight in prunable(module) if weight.name not in rows]
    found["layers"] = [rows[weight.name] for weight in weights.weights if weight.name in rows]
    found["layers_left_in_float"] = [{"name": weight.name, "weights": weight.value().numel()} for weight in left]
    return found


def group_of(step: WeightOnly, layer: nn.Module, columns: int) -> int:
    """How many columns of a layer's matrix share a step."""
    if step.group_size is None or isinstance(layer, nn.Conv1d | nn.Conv2d):
        return columns
    size = math.gcd(step.group_size, columns)
    return size if size >= LEAST_GROUP else columns


def _chosen(step: WeightOnly, module: nn.Module) -> list[PrunableWeight]:
    return [weight for weight in select(module, step.exclude) if takes_columns(weight.owner)]


def _quantize(
    step: WeightOnly, context: Context, weight: PrunableWeight, moments: Tensor | None
) -> dict[str, float | int | str | None]:
    value = matrix(weight, weight.value()).detach().float().clone()
    kept = matrix(weight, WeightSet(context.model.module, [weight]).kept()[0])
    group = group_of(step, weight.owner, value.shape[1])
    dtype = context.model.stored.get(weight.name, torch.float32)
    if moments is None:
        codes, grids = _nearest(step, torch.where(kept, value, 0.0), group, dtype)
    else:
        codes, grids = gptq_math.quantized(value, moments, kept, step.bits, group, step.symmetric, dtype)
    found = gptq_math.values(codes, grids, group)
    context.grids[weight.name] = WeightGrid.of(grids, step.bits, group, step.symmetric)
    with torch.no_grad():
        parameter = stored(weight.owner, weight.attribute)
        parameter.copy_(unmatrix(weight, found).to(parameter.dtype))
    return {"name": weight.name, "weights": value.numel(), "group": group, "sqnr_db": sqnr(value * kept, found)}


def _nearest(step: WeightOnly, value: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, list[Grid]]:
    """Codes and grids, as of `gptq_math.quantized`."""
    parts = value.split(group, 1)
    grids = [least_squares(own, step.bits, step.symmetric).held_in(dtype) for own in parts]
    return torch.cat([grid.codes(own) for grid, own in zip(grids, parts, strict=True)], 1), grids


def sqnr(before: Tensor, after: Tensor) -> float | None:
    """Signal to quantization noise, in decibels: 10 log10(sum w^2 / sum (w - w')^2); None where nothing changed."""
    noise = float((before.double() - after.double()).square().sum())
    signal = float(before.double().square().sum())
    return 10 * math.log10(signal / noise) if noise and signal else None
