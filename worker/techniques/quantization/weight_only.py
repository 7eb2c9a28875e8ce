"""Weight-only quantization: the weights of a layer come to lie on grids of few bits, and stay where they are.

The module holds what the numbers stand for, in floats, and the context their grids, for exporters that store codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from app.contract.weight_only import FewBits, WeightOnly
from worker.constraints import stored
from worker.context import Context
from worker.evaluation.layers import sqnr_db
from worker.model import Model
from worker.techniques.base import Details
from worker.techniques.pruning.by_inputs import Told, finite, through, unheard
from worker.techniques.pruning.inputs import Moments, matrix, takes_columns, unmatrix
from worker.techniques.pruning.weights import PrunableWeight, WeightSet, prunable, select
from worker.techniques.quantization import awq, gptq_math, hqq_math
from worker.techniques.quantization.grid_math import Grid, least_squares
from worker.techniques.quantization.groups import Fit, group_of, nearest
from worker.techniques.quantization.weight_grid import WeightGrid

Row = dict[str, float | int | str | None]
SCALING = 0.5  # of the progress of algorithms that move factors first


def applies(step: FewBits, model: Model) -> str | None:
    """None, or why no weight of the model is for it. Raises InvalidSpec for patterns that match nothing."""
    if not any(takes_columns(weight.owner) for weight in prunable(model.module)):
        return "Weight-only quantization is for Linear, Conv1d and Conv2d layers that torch computes; there are none."
    if not chosen(step, model.module):
        return "exclude leaves no layer to quantize."
    return None


def quantize_weights(step: WeightOnly, context: Context) -> Details:
    """Moves the weights to their grids. Masks hold: a pruned weight is the code of zero.

    Raises DatasetMismatch where the algorithm looks at data and there is none, InvalidSpec where a layer's inputs are
    not finite.
    """
    module = context.model.module
    weights = chosen(step, module)
    tables = _tables(step, module)
    rows: dict[str, Row] = {}
    found: Details = {
        "method": step.method,
        "bits": step.bits,
        "algorithm": step.algorithm,
        "symmetric": step.symmetric,
    }
    for weight in tables:  # first, so that what follows makes up for it
        assert step.embeddings is not None
        rows[weight.name] = _quantize(step.of_embeddings, step.embeddings, context, weight, None)
    bits = dict.fromkeys((weight.name for weight in weights), step.bits)
    found |= round_weights(step, bits, context, rows, context.progress)
    left = [weight for weight in prunable(module) if weight.name not in rows]
    found["layers"] = [rows[weight.name] for weight in (*tables, *weights) if weight.name in rows]
    found["layers_left_in_float"] = [{"name": weight.name, "weights": weight.value().numel()} for weight in left]
    return found


def round_weights(
    step: FewBits, bits: Mapping[str, int], context: Context, rows: dict[str, Row], progress: Told = unheard
) -> Details:
    """Moves the step's weights that `bits` names to grids of so many, and adds what became of each to `rows`."""
    module = context.model.module
    weights = [weight for weight in chosen(step, module) if weight.name in bits]
    if step.looks_at_inputs and weights:
        found = context.ranks.told(lambda: _by_inputs(step, bits, context, WeightSet(module, weights), rows, progress))
        context.ranks.alike(parameter.data for parameter in module.parameters())
        return found
    for number, weight in enumerate(weights, 1):
        rows[weight.name] = _quantize(step, bits[weight.name], context, weight, None)
        progress(number / len(weights))
    return {}


def _by_inputs(
    step: FewBits, bits: Mapping[str, int], context: Context, weights: WeightSet, rows: dict[str, Row], progress: Told
) -> Details:
    found: Details = {}
    begin = 0.0
    if step.scales_channels:
        begin = SCALING
        found = awq.scale_channels(step, bits, context, weights, lambda share: progress(SCALING * share))

    def visit(weight: PrunableWeight, moments: Moments) -> None:
        own = finite(moments, weight, step.algorithm)
        rows[weight.name] = _quantize(step, bits[weight.name], context, weight, own)

    why = f"{step.algorithm} looks at inputs"
    return found | through(
        context, weights, step.samples, why, step.makes_up, visit, lambda share: progress(begin + (1 - begin) * share)
    )


def chosen(step: FewBits, module: nn.Module) -> list[PrunableWeight]:
    """The weights that the step is for."""
    return [weight for weight in select(module, step.exclude) if takes_columns(weight.owner)]


def _tables(step: WeightOnly, module: nn.Module) -> list[PrunableWeight]:
    """Embeddings, if they are asked for."""
    if step.embeddings is None:
        return []
    return [weight for weight in select(module, step.exclude) if isinstance(weight.owner, nn.Embedding)]


def alone(
    step: FewBits,
    bits: Sequence[int],
    context: Context,
    weights: list[PrunableWeight],
    take: Callable[[PrunableWeight, Iterable[Tensor]], None],
) -> None:
    """Hands over each weight with what it becomes in each of `bits`, all others being as they are; nothing changes.

    The step's algorithm rounds, but that AWQ moves no factors.
    """

    def visit(weight: PrunableWeight, moments: Moments | None) -> None:
        own = None if moments is None else finite(moments, weight, step.algorithm)
        take(weight, (unmatrix(weight, _rounded(step, width, context, weight, own)[0]) for width in bits))

    if step.looks_at_inputs:
        every = WeightSet(context.model.module, weights)
        through(context, every, step.samples, f"{step.algorithm} looks at inputs", step.makes_up, visit)
        return
    for weight in weights:
        visit(weight, None)


def _quantize(step: FewBits, bits: int, context: Context, weight: PrunableWeight, moments: Tensor | None) -> Row:
    """Moves a weight to its grid. `moments` are X X^T where columns make up for each
    other, the diagonal of it for awq alone."""
    before = matrix(weight, weight.value()).detach().float().clone()
    found, grid = _rounded(step, bits, context, weight, moments)
    context.grids[weight.name] = grid
    with torch.no_grad():
        parameter = stored(weight.owner, weight.attribute)
        parameter.copy_(unmatrix(weight, found).to(parameter.dtype))
    return {
        "name": weight.name,
        "weights": before.numel(),
        "bits": bits,
        "group": grid.group,
        "sqnr_db": sqnr(before, found),
    }


def _rounded(
    step: FewBits, bits: int, context: Context, weight: PrunableWeight, moments: Tensor | None
) -> tuple[Tensor, WeightGrid]:
    """What a weight becomes, as a matrix, and its grid; what is pruned is zero."""
    value = matrix(weight, weight.value()).detach().float().clone()
    kept = matrix(weight, WeightSet(context.model.module, [weight]).kept()[0])
    group = group_of(step, weight.owner, value.shape[1])
    dtype = context.model.stored.get(weight.name, torch.float32)
    if step.makes_up:
        assert moments is not None
        codes, grids = gptq_math.quantized(value, moments, kept, bits, group, step.symmetric, dtype)
        return gptq_math.values(codes, grids, group), WeightGrid.of(grids, bits, group, step.symmetric)
    fit = _fit(step, bits, group, dtype, moments)
    found, steps, zeros = nearest(torch.where(kept, value, 0.0), group, fit, dtype)
    return found, WeightGrid(bits, group, step.symmetric, steps.cpu(), zeros.cpu())


def _fit(step: FewBits, bits: int, group: int, dtype: torch.dtype, importance: Tensor | None) -> Fit:
    """How the grid of each group [groups of all outputs, group] is found."""
    if step.moves_zeros:
        return lambda parts: hqq_math.fitted(parts, bits, dtype)
    if importance is None:
        return lambda parts: least_squares(parts, bits, step.symmetric)

    def weighed(parts: Tensor) -> Grid:
        own = importance.view(-1, group)  # of one output, and all have the same
        return least_squares(parts, bits, step.symmetric, own.repeat(len(parts) // len(own), 1))

    return weighed


def sqnr(before: Tensor, after: Tensor) -> float | None:
    """`sqnr_db` of a weight; None where nothing changed, or nothing was there."""
    if torch.equal(before, after) or not before.any():
        return None
    return sqnr_db(before.cpu().numpy(), after.cpu().numpy())
