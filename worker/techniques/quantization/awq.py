"""AWQ on a network: factors for the channels between layers, wherever they can be moved, before weights are rounded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from app.contract.weight_only import FewBits
from worker.context import Context
from worker.techniques.base import Details
from worker.techniques.pruning.by_inputs import BATCH, Told, finite, through
from worker.techniques.pruning.inputs import Moments, matrix
from worker.techniques.pruning.samples import calibration
from worker.techniques.pruning.weights import PrunableWeight, WeightSet
from worker.techniques.quantization.awq_math import best_factors
from worker.techniques.quantization.folding import folds
from worker.techniques.quantization.grid_math import whole_range
from worker.techniques.quantization.groups import group_of, nearest

WHY = "awq looks at inputs"
TRIED_ON = 2  # samples, to find folds
FITTED_ON = 8_192  # rows of channels, to find factors: more give the same


def scale_channels(
    step: FewBits,
    bits: Mapping[str, int],
    context: Context,
    weights: WeightSet,
    progress: Told,
) -> Details:
    """Moves factors through every fold of the network, in place; what it gives stays the same but for rounding. `bits`
    are those of each weight.

    Raises DatasetMismatch without data, InvalidSpec where a layer's inputs are not finite.
    """
    module = context.model.module.eval()
    batch = next(iter(calibration(context, BATCH, step.samples, WHY))).inputs
    by_layer = {weight.owner: weight for weight in weights.weights}
    found = folds(module, tuple(tensor[:TRIED_ON] for tensor in batch), list(by_layer))
    # All targets of a fold read the same, so one of them is looked at.
    places = {fold.targets[0]: fold for fold in found}
    exponents: list[float] = []

    def visit(weight: PrunableWeight, moments: Moments) -> None:
        fold = places[weight.owner]
        targets = [by_layer[target] for target in fold.targets]
        rows = [matrix(target, target.value()).float() for target in targets]
        group = group_of(step, weight.owner, rows[0].shape[1])

        def rounded(number: int, scaled: Tensor) -> Tensor:
            own = bits[targets[number].name]
            return nearest(scaled, group, lambda parts: whole_range(parts, own, step.symmetric))[0]

        factors, exponent = best_factors(rows, finite(moments, weight, "awq"), rounded)
        exponents.append(exponent)
        if exponent:
            fold.move(factors)

    chosen = WeightSet(module, [by_layer[layer] for layer in places])
    if chosen.weights:
        enough = -(-FITTED_ON // max(1, min(fold.rows for fold in found)))
        through(context, chosen, min(step.samples, enough), WHY, True, visit, progress)
    return {
        "folds": len(found),
        "layers_scaled": sum(len(fold.targets) for fold in found),
        "mean_exponent": sum(exponents) / len(exponents) if exponents else None,
    }
