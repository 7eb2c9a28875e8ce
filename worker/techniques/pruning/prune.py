"""Pruning of weights: single ones, N of M, or blocks; by any criterion, at once or gradually."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from app.contract.errors import InvalidSpec
from app.contract.pruning import OF_GRADIENTS, OF_INPUTS, Prune
from app.contract.structured import StructuredPrune
from worker.context import Context
from worker.model import Model
from worker.ranks.ranks import Ranks
from worker.techniques.base import Details
from worker.techniques.pruning import selection_math
from worker.techniques.pruning.by_inputs import prune_by_inputs, scored_by_inputs
from worker.techniques.pruning.choosing import Chooser, drop_groups
from worker.techniques.pruning.grain import Blocks, Elements, Grain, fits_groups
from worker.techniques.pruning.growing import Growing, Regrowing, way
from worker.techniques.pruning.noise import WeightNoise, noisy, observations
from worker.techniques.pruning.rounds import prune_in_rounds
from worker.techniques.pruning.scoring import scorer
from worker.techniques.pruning.weights import PrunableWeight, WeightSet, prunable, select
from worker.techniques.structure import structured
from worker.training.finding.settle import settle
from worker.training.loop import fed, train


class PruneTechnique:
    """Sets the least important weights to zero, by masks that every later step keeps; or takes whole units out."""

    name: ClassVar[str] = "prune"

    def applies(self, step: Prune | StructuredPrune, model: Model) -> str | None:
        """A network needs a Linear, convolution, Embedding, recurrent or attention layer.

        Raises InvalidSpec where `exclude` or `layers` name none of them, or nothing is left to prune.
        """
        if isinstance(step, StructuredPrune):
            return structured.applies(step, model)
        if not model.facts.trainable and (step.training is not None or step.criterion in OF_GRADIENTS):
            return model.facts.untrainable_reason
        if not prunable(model.module):
            return "The model has no layer with weights that can be pruned."
        chosen = select(model.module, step.exclude, tuple(step.layers))
        if step.criterion in OF_INPUTS and not scored_by_inputs(chosen):
            return (
                f"{step.criterion} needs Linear, Conv1d or Conv2d layers that torch computes, and the model has none."
            )
        if step.criterion == "variational" and not noisy(model, chosen):
            return "variational needs Linear, Embedding or convolution layers that torch computes, and there are none."
        fitting(step, _in_reach(step, model, chosen))
        return None

    def apply(self, step: Prune | StructuredPrune, context: Context) -> Details:
        """Prunes, and trains where the step says so; one_shot before the training, the other schedules during it."""
        if isinstance(step, StructuredPrune):
            return structured.prune_structured(step, context)
        module = context.model.module
        chosen = select(module, step.exclude, tuple(step.layers))
        weights = WeightSet(module, fitting(step, _in_reach(step, context.model, chosen)))
        left = [weight for weight in chosen if weight not in weights.weights]
        if step.sparsity is None or step.criterion in OF_INPUTS:
            found, chooser = _at_once(step, context, weights), None
        else:
            noise = _noise(step, context, weights)
            scores = scorer(step, context, weights) if noise is None else noise.scores
            chooser = Chooser(step, context, weights, grain_of(step), scores)
            if noise is not None:
                noise.wanted = chooser.left
            found = _towards(step, context, weights, chooser, noise)
        return _details(weights, chooser, left) | found


def grain_of(step: Prune) -> Grain:
    """What goes as one."""
    return Elements() if step.block is None else Blocks(*step.block, step.norm)


def fitting(step: Prune, weights: list[PrunableWeight]) -> list[PrunableWeight]:
    """Those of the weights that the step's pattern and criterion are for. Raises InvalidSpec where there are none."""
    if step.criterion in OF_INPUTS:
        weights = scored_by_inputs(weights)
    if step.n_of_m is not None:
        found = [weight for weight in weights if fits_groups(weight, step.n_of_m[1])]
    else:
        found = [weight for weight in weights if grain_of(step).fits(weight)]
    if not found:
        what = (
            f"blocks of {step.block[0]}x{step.block[1]}" if step.block is not None else f"groups of {step.granularity}"
        )
        raise InvalidSpec(f"No weight of the model can be cut into {what}. Give smaller ones, or unstructured.")
    return found


def _in_reach(step: Prune, model: Model, weights: list[PrunableWeight]) -> list[PrunableWeight]:
    """Those that the criterion can be asked of once the network is there to be looked at."""
    return noisy(model, weights) if step.criterion == "variational" else weights


def _noise(step: Prune, context: Context, weights: WeightSet) -> WeightNoise | None:
    if step.criterion != "variational":
        return None
    return WeightNoise(context.model.module, weights.weights, observations(fed(context.feed), context.seed))


def _at_once(step: Prune, context: Context, weights: WeightSet) -> Details:
    """What no sparsity grows to: thresholds, N of M, and criteria that look at inputs; and the training behind it."""
    found: Details = {}
    if step.criterion in OF_INPUTS:
        found = context.ranks.told(lambda: prune_by_inputs(step, context, weights))
        _agree(context, weights)
    elif step.n_of_m is not None:
        drop_groups(step, weights, scorer(step, context, weights)())
    else:
        assert step.threshold is not None
        dropped = selection_math.below(weights.values(), step.threshold)
        _refuse_emptied(weights, dropped, step.threshold)
        weights.drop(dropped)
    return found | _trained(step, context)


def _agree(context: Context, weights: WeightSet) -> None:
    """What the first process found out about weights, in all of them."""
    kept = weights.kept()
    context.ranks.alike(kept)
    weights.drop([~mask for mask in kept])
    context.ranks.alike(parameter.data for parameter in context.model.module.parameters())


def _towards(step: Prune, context: Context, weights: WeightSet, chooser: Chooser, noise: WeightNoise | None) -> Details:
    """Pruning to a sparsity, by the step's schedule."""
    if step.rewind is not None:
        return prune_in_rounds(step, context, chooser, weights)
    if step.training is None or step.schedule == "one_shot":
        rounds = step.rounds if step.schedule == "iterative" else 1
        held = weights.kept()
        for number in range(rounds):
            chooser.prune(way(step, chooser, number + 1) if rounds > 1 else 1.0)
        return _trained(step, context, None, weights, held)
    return _trained(step, context, chooser, weights, weights.kept(), noise)


def _trained(
    step: Prune,
    context: Context,
    chooser: Chooser | None = None,
    weights: WeightSet | None = None,
    held: list[Tensor] | None = None,
    noise: WeightNoise | None = None,
) -> Details:
    """The step's training, with what happens to masks in it: growing where there is a chooser, and regrowth.

    `held` are the masks from before the step."""
    if step.training is None:
        return {}
    training, found = settle(context, step.training)
    ranks = context.ranks if training.ranks > 1 else Ranks()
    growing = None
    if chooser is not None and weights is not None:
        growing = Growing(step, chooser, weights, ranks, noise)
    if noise is not None:
        noise.rate = training.lr
        with noise.heard():
            return found | train(context, training, growing, penalty=noise).details()
    if step.regrow is None or weights is None or held is None:
        return found | train(context, training, growing).details()
    if chooser is not None:
        weights.drop([~mask for mask in held])  # every weight has a mask from the first step on
    regrowing = Regrowing(step.regrow, weights, grain_of(step), held, ranks, growing)
    details = train(context, training, regrowing).details()
    return found | {"regrown_weights": regrowing.exchanged} | details


def _refuse_emptied(weights: WeightSet, dropped: list[Tensor], threshold: float) -> None:
    """A threshold above all weights of a layer would cut the network: refused, naming the layer."""
    for weight, value, gone in zip(weights.weights, weights.values(), dropped, strict=True):
        if gone.all() and value.any():
            raise InvalidSpec(
                f"The threshold {threshold:g} removes every weight of {weight.name}, whose largest is "
                f"{float(value.abs().max()):.3g}. Use a lower threshold, or exclude {(weight.layer or weight.name)!r}."
            )


def _details(weights: WeightSet, chooser: Chooser | None, left: list[PrunableWeight]) -> Details:
    """Totals, and a row a layer; `minimum` is what a layer keeps at least, null where it was not asked."""
    rows: list[dict[str, float | int | str | None]] = []
    for place, (weight, kept) in enumerate(zip(weights.weights, weights.kept(), strict=True)):
        count, own = kept.numel(), int(kept.count_nonzero())
        minimum = None if chooser is None else chooser.minimum(place)
        rows.append(
            {"name": weight.name, "weights": count, "kept": own, "sparsity": 1 - own / count, "minimum": minimum}
        )
    removed, total = weights.removed(), weights.total()
    details: Details = {
        "prunable_weights": total,
        "removed_weights": removed,
        "sparsity": removed / total,
        "layers_held_at_minimum": sum(row["kept"] == row["minimum"] for row in rows),
        "layers": rows,
    }
    if left:
        details["layers_left_alone"] = [{"name": weight.name, "weights": weight.value().numel()} for weight in left]
    return details | (chooser.details if chooser is not None else {})
