"""Factorization: layers become products of thinner ones, within a budget or to a share of their energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from app.contract.factorizing import Factorize
from worker.context import Context
from worker.model import Model
from worker.structure.edits import factorized
from worker.structure.forms import Factors, fill
from worker.structure.restructured import restructure, take
from worker.techniques.base import Details
from worker.techniques.structure import allocation
from worker.techniques.structure.candidates import Candidate, candidates
from worker.techniques.structure.limits import had, remaining
from worker.techniques.structure.metrics import metrics
from worker.techniques.structure.ranking import Option, Ranking, ranking
from worker.techniques.structure.unit_limits import within_budget
from worker.training.finding.settle import settle
from worker.training.loop import train


@dataclass(frozen=True)
class Chosen:
    """What a layer becomes, and the share of its energy that this leaves out."""

    factors: Factors
    left_out: float


class FactorizeTechnique:
    """Puts products in the place of layers; what comes out is a smaller dense network."""

    name: ClassVar[str] = "factorize"

    def applies(self, step: Factorize, model: Model) -> str | None:
        """A network needs a Linear layer or a convolution that torch computes.

        Raises InvalidSpec where `exclude` matches nothing, or leaves nothing.
        """
        if not model.facts.trainable:
            return model.facts.untrainable_reason
        if model.facts.format in ("pt2", "onnx") and any(dtype != torch.float32 for dtype in model.stored.values()):
            return "The graph computes in narrower floats than float32, whose layers are not taken apart."
        if not candidates(step, model):
            return f"The model has no layer of its own that method {step.method} could make a product of."
        return None

    def apply(self, step: Factorize, context: Context) -> Details:
        """Chooses ranks, replaces layers, and trains where the step says so."""
        found = candidates(step, context.model)
        known: dict[str, Ranking] = {}  # of the process that chooses, and fills what was chosen

        def choose() -> list[Chosen | None]:
            known.update(_rankings(step, context, found))
            return _chosen(step, context, found, known)

        chosen = context.ranks.told(choose)
        details = _replace(step, context, list(zip(found, chosen, strict=True)), known)
        if step.training is None:
            return details
        training, settled = settle(context, step.training)
        return details | settled | train(context, training).details()


def _chosen(
    step: Factorize, context: Context, layers: Sequence[Candidate], known: Mapping[str, Ranking]
) -> list[Chosen | None]:
    """What each layer becomes; None for those that stay. Raises InvalidSpec for a budget that cannot be kept."""
    options = [known[one.name].options() for one in layers]
    if step.budget is None:
        assert step.energy is not None
        return [_keeping(step.energy, own) for own in options]
    losses = allocation.by_energy(options)
    if step.allocation == "measured":
        losses = allocation.by_outputs(context, layers, known, options, step.samples)
    limit = within_budget(step.budget, context)
    if limit.runtime is None:
        kept = allocation.allotted(limit, context.model, layers, options, losses)
    else:
        kept = allocation.timed(limit, context, layers, options, losses)
    return [None if own is None else _of(own, given) for own, given in zip(kept, options, strict=True)]


def _rankings(step: Factorize, context: Context, layers: Sequence[Candidate]) -> dict[str, Ranking]:
    own = metrics(step, context, layers)
    return {one.name: ranking(one, own[one.name], context.seed) for one in layers}


def _keeping(energy: float, options: Sequence[Option]) -> Chosen | None:
    """The smallest that keeps so much."""
    enough = [option for option in options if option.left_out <= 1 - energy]
    return Chosen(enough[0].factors, enough[0].left_out) if enough else None


def _of(factors: Factors, options: Sequence[Option]) -> Chosen:
    return next(Chosen(factors, option.left_out) for option in options if option.factors == factors)


def _replace(
    step: Factorize,
    context: Context,
    layers: Sequence[tuple[Candidate, Chosen | None]],
    known: Mapping[str, Ranking],
) -> Details:
    """Puts the products in, with their weights; the same in all processes."""
    before = had(context.model)
    rows = [_row(one, own) for one, own in layers]
    pairs = [(one, own) for one, own in layers if own is not None]
    if pairs:
        edits = [factorized(one.name, own.factors) for one, own in pairs]
        module = restructure(context, edits)
        for one, own in pairs:
            made = module.get_submodule(one.name)
            assert isinstance(made, nn.Sequential)
            if one.name in known:
                fill(made, known[one.name].weights(own.factors))
        take(context, module, edits)
        context.ranks.alike(parameter.data for parameter in context.model.module.parameters())
    details: Details = {"method": step.method, "criterion": step.criterion, "factorized_layers": len(pairs)}
    return details | remaining(before, context.model) | {"layers": rows}


def _row(one: Candidate, own: Chosen | None) -> dict[str, float | int | str | None]:
    if own is None:
        return {"name": one.name, "form": None, "ranks": None, "parameters": one.parameters, "energy": 1.0}
    ranks = " x ".join(map(str, own.factors.ranks))
    parameters = own.factors.parameters(one.layer)
    return {
        "name": one.name, "form": own.factors.form, "ranks": ranks, "parameters": parameters,
        "energy": 1 - own.left_out,
    }  # fmt: skip
