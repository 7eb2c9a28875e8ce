"""Which errors of a layer count: those of weights, of what it gives, or of outputs that the loss hangs on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from app.contract.factorizing import OF_GRADIENTS, OF_INPUTS, Factorize
from worker.context import Context
from worker.structure.forms import kernel_of
from worker.techniques.pruning.by_inputs import finite, through
from worker.techniques.pruning.gradients import mean_squares
from worker.techniques.pruning.inputs import Moments, channels
from worker.techniques.pruning.weights import PrunableWeight, WeightSet
from worker.techniques.structure import factor_math
from worker.techniques.structure.candidates import Candidate
from worker.techniques.structure.factor_math import Metric


def metrics(step: Factorize, context: Context, layers: Sequence[Candidate]) -> dict[str, Metric]:
    """By the layer's name. Raises DatasetMismatch where the criterion has no data, InvalidSpec where inputs are not
    finite."""
    weights = [one.weight for one in layers]
    match step.criterion:
        case own if own == OF_INPUTS:
            moments = moments_of(step, context, weights)
            return {one.name: factor_math.by_inputs(kernel_of(one.layer), moments[one.name]) for one in layers}
        case own if own == OF_GRADIENTS:
            squares = mean_squares(context, weights, step.samples)
            return {one.name: _fisher(one, own) for one, own in zip(layers, squares, strict=True)}
        case _:
            return {one.name: factor_math.plain(kernel_of(one.layer)) for one in layers}


def _fisher(one: Candidate, squares: Tensor) -> Metric:
    information = one.weight.by_output(squares.float().cpu()).flatten(1).sum(1)
    return factor_math.by_outputs(kernel_of(one.layer), information)


def moments_of(step: Factorize, context: Context, weights: list[PrunableWeight]) -> dict[str, Tensor]:
    """The second moments [inputs, inputs] of the channels that come into each layer, over all places together."""
    found: dict[str, Tensor] = {}

    def visit(weight: PrunableWeight, moments: Moments) -> None:
        found[weight.layer] = finite(moments, weight, f"Criterion {step.criterion}").cpu()

    own, why = WeightSet(context.model.module, weights), f"Criterion {step.criterion} looks at inputs of layers"
    through(context, own, step.samples, why, True, visit, rows=channels)
    return found
