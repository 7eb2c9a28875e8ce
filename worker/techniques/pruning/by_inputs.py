"""Wanda and SparseGPT on a network: layer by layer, by what comes into each, a block of the network at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from app.contract.errors import InvalidSpec
from app.contract.pruning import Prune
from worker.constraints import stored
from worker.context import Context
from worker.techniques.base import Details
from worker.techniques.pruning import scores_math, selection_math, sparsegpt_math
from worker.techniques.pruning.choosing import named_sparsity
from worker.techniques.pruning.inputs import Moments, Rows, columns, matrix, takes_columns, unmatrix, watching
from worker.techniques.pruning.samples import calibration
from worker.techniques.pruning.walk import stages
from worker.techniques.pruning.weights import PrunableWeight, WeightSet

BATCH = 8  # samples at a time

Visit = Callable[[PrunableWeight, Moments], None]
Told = Callable[[float], None]
"""Takes the share that is done."""


def unheard(share: float) -> None:
    """Nobody waits for it."""


def prune_by_inputs(step: Prune, context: Context, weights: WeightSet) -> Details:
    """Prunes every weight once, from front to back; those behind see what those before have become.

    Raises DatasetMismatch without data, InvalidSpec where a layer's inputs are not finite.
    """
    why = "The criterion looks at inputs of layers"
    full = step.criterion == "sparsegpt"

    def visit(weight: PrunableWeight, moments: Moments) -> None:
        _prune(step, weights, weight, moments)

    return through(context, weights, step.samples, why, full, visit, context.progress)


def through(
    context: Context,
    weights: WeightSet,
    samples: int,
    why: str,
    full: bool,
    visit: Visit,
    progress: Told = unheard,
    rows: Rows = columns,
) -> Details:
    """Visits every weight once, from front to back, with what came into its layer: the products of all columns of its
    `rows` with each other where `full`, else their squares. `progress` is told the share of the weights that were.

    Raises DatasetMismatch, saying `why` they are needed, without data.
    """
    module = context.model.module
    batches = [batch.inputs for batch in calibration(context, BATCH, samples, why)]
    by_layer = {weight.owner: weight for weight in weights.weights}
    training = module.training
    module.eval()
    most, visited = 0, 0
    try:
        for stage in stages(module, batches, list(by_layer)):
            with watching(stage.layers, full, rows) as moments:
                stage.run()
            most = max(most, stage.held_bytes + sum(own.nbytes for own in moments))
            for layer, own in zip(stage.layers, moments, strict=True):
                visit(by_layer[layer], own)
                visited += 1
                progress(visited / len(by_layer))
    finally:
        module.train(training)
    return {"calibration_samples": sum(len(batch[0]) for batch in batches), "calibration_bytes": most}


def finite(moments: Moments, weight: PrunableWeight, what: str) -> Tensor:
    """What came into a layer. Raises InvalidSpec, saying `what` asks, where nothing finite did."""
    if moments.sum is None or not bool(moments.sum.isfinite().all()):
        raise InvalidSpec(
            f"{what}: nothing finite comes into {weight.layer!r} from the samples. Exclude it, or give other samples."
        )
    return moments.sum


def scored_by_inputs(weights: list[PrunableWeight]) -> list[PrunableWeight]:
    """Those whose layers have inputs that a column of the weight is for, each layer's one weight."""
    return [weight for weight in weights if takes_columns(weight.owner)]


def _prune(step: Prune, weights: WeightSet, weight: PrunableWeight, moments: Moments) -> None:
    value, kept = matrix(weight, weight.value()), matrix(weight, _kept(weights, weight))
    came = finite(moments, weight, step.criterion)
    sparsity = named_sparsity(step, weight) or step.sparsity
    if step.criterion == "sparsegpt":
        value, dropped = sparsegpt_math.pruned(value, came, kept, sparsity, step.n_of_m)
        with torch.no_grad():
            parameter = stored(weight.owner, weight.attribute)
            parameter.copy_(unmatrix(weight, value).to(parameter.dtype))
    else:
        scores = scores_math.wanda(value.float(), came.sqrt())
        dropped = _row_by_row(scores, kept, sparsity, step.n_of_m)
    WeightSet(weights.module, [weight]).drop([unmatrix(weight, dropped)])


def _row_by_row(scores: Tensor, kept: Tensor, sparsity: float | None, groups: tuple[int, int] | None) -> Tensor:
    """Wanda compares the weights of one output with each other; the layer's count is exact."""
    scores = torch.where(kept, scores, -torch.inf)
    if groups is not None:
        return selection_math.lowest_of_groups(scores.reshape(-1, groups[1]), groups[0]).view(scores.shape)
    assert sparsity is not None
    rows, columns = scores.shape
    ends = [selection_math.removals((row + 1) * columns, sparsity) for row in range(rows)]
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return torch.stack(
        selection_math.lowest_each(list(scores), [torch.ones_like(row, dtype=torch.bool) for row in scores], counts)
    )


def _kept(weights: WeightSet, weight: PrunableWeight) -> Tensor:
    return WeightSet(weights.module, [weight]).kept()[0]
