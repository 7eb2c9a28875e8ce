"""Fusing: what a trained network computes for nothing leaves it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx, nn

from app.contract.fusing import Fuse
from worker.constraints import baked
from worker.context import Context
from worker.loading.architecture import ArchitecturePlan
from worker.model import Model
from worker.structure.fusing.foldable import Stays
from worker.structure.fusing.judging import looked_at, samples_of
from worker.structure.fusing.passes import Fusion, fuse, kinds, make
from worker.structure.patterns import matches
from worker.structure.restructured import take
from worker.techniques.base import Details
from worker.techniques.structure.limits import had, remaining

SAMPLES = 4  # of the job's data, with which outputs are compared besides
_OF_GRAPHS = "the network's code computes it: only the operators of a program or an ONNX graph can be changed"
_OF_ROWS = "layers one behind the other have none"


class FuseTechnique:
    """Rewrites a network into one that gives the same with less."""

    name: ClassVar[str] = "fuse"

    def applies(self, step: Fuse, model: Model) -> str | None:
        """Every network that torch computes in float32; one in which nothing is found stays as it is."""
        if not model.facts.trainable:
            return model.facts.untrainable_reason
        if model.facts.format in ("pt2", "onnx") and any(own.itemsize < 4 for own in model.stored.values()):
            return "The graph computes in narrower floats than float32, to which what is fused would be rounded."
        return None

    def apply(self, step: Fuse, context: Context) -> Details:
        """Looks, tries each pass, and makes what holds; the same in all processes."""
        model = context.model
        before, operators = had(model), kinds(model.module, looked_at(model)[0])
        found = context.ranks.told(lambda: _found(step, context))
        if found.edits:
            module = baked(model.module)
            make(module, found.edits)
            take(context, module, found.edits)
            context.ranks.alike(parameter.data for parameter in context.model.module.parameters())
        now = kinds(context.model.module, looked_at(context.model)[0])
        changed = [name for name in operators | now if operators[name] != now[name]]
        details: Details = {
            "operators_before": operators.total(), "operators": now.total(),
            "operators_by_kind": [{"kind": name, "before": operators[name], "after": now[name]} for name in changed],
            "difference": found.difference, "rounding": found.rounding,
        }  # fmt: skip
        return details | remaining(before, context.model) | _rows(step, found, model)


def _found(step: Fuse, context: Context) -> Fusion:
    model, inputs = context.model, looked_at(context.model)
    samples = samples_of(context.feed, SAMPLES)
    judged = [*inputs, *(tuple(own.to(context.device) for own in one) for one in samples)]
    return fuse(model.module, inputs, judged, step.passes, _stays(step, model), for_inference=step.for_inference)


def _stays(step: Fuse, model: Model) -> Stays:
    def why(name: str) -> str | None:
        if any(matches(pattern, name) for pattern in step.exclude):
            return "it is excluded"
        dtype = model.stored.get(f"{name}.weight", torch.float32)
        if dtype.itemsize < torch.float32.itemsize:
            kind = str(dtype).removeprefix("torch.")
            return f"the file stores its weights in {kind}, to which those of both together would be rounded"
        return None

    return why


def _rows(step: Fuse, found: Fusion, model: Model) -> Details:
    """By pass how much was done, what went where, and what stayed with the reason."""
    details: Details = {
        "passes": [
            {"pass": name, "done": count, "refused": found.refused.get(name) or _no_place(name, model)}
            for name, count in found.done.items()
        ]
    }
    if found.folds:
        details["batch_norms"] = [{"name": one["norm"], "into": one["layer"]} for one in found.folds]
    if found.dead:
        details["dead"] = found.dead
    if found.kept:
        details["left_alone"] = [{"name": name, "why": why} for name, why in found.kept.items()]
    return details


def _no_place(name: str, model: Model) -> str | None:
    """Why a pass has nothing to look at in a network of this kind."""
    if isinstance(model.module, fx.GraphModule) or name == "batch_norm":
        return None
    if isinstance(model.plan, ArchitecturePlan) and isinstance(model.module, nn.Sequential):
        return None if name == "identities" else _OF_ROWS
    return None if name == "dead" else _OF_GRAPHS
