"""Structured pruning: units leave the network, at once or round by round, with training to recover."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from app.contract.errors import InvalidSpec, Unsupported
from app.contract.structured import StructuredPrune
from app.contract.widths import TakesUnits
from worker.context import Context
from worker.model import Model
from worker.structure.calls import example_on
from worker.structure.edits import Edit
from worker.structure.groups import Group, Structure, structure_of
from worker.structure.narrowing import left
from worker.structure.patterns import matches
from worker.structure.restructured import retake, take
from worker.structure.sound import standing, without
from worker.techniques.base import Details
from worker.techniques.pruning.weights import LAYERS_NAMED, prunable
from worker.techniques.structure.lasso import Lasso
from worker.techniques.structure.limits import had, remaining
from worker.techniques.structure.renewal import Renewal, fitted_layers
from worker.techniques.structure.selection import Stay, chosen, least_of
from worker.techniques.structure.statistics import Found
from worker.techniques.structure.unit_limits import UNITS, limit_for
from worker.training.finding.settle import settle
from worker.training.loop import train

MANY = 30_000_000  # parameters of a network that takes seconds to look at
EXAMPLES = 2  # samples that a network is looked at with
KEPT = "narrowed"  # in what a checkpoint remembers


def applies(step: TakesUnits, model: Model) -> str | None:
    """A network that can be trained, with units that may leave it. Raises InvalidSpec where `exclude` matches no layer
    that has any, or leaves none."""
    if not model.facts.trainable:
        return model.facts.untrainable_reason
    if model.facts.format in ("pt2", "onnx") and any(dtype != torch.float32 for dtype in model.stored.values()):
        return "The graph computes in narrower floats than float32, of which nothing is taken out."
    if not prunable(model.module):
        return "The model has no layer that makes units."
    if model.facts.parameters > MANY:  # looked at when its turn has come
        return None
    structure = structure_in(model)
    if not structure.groups:
        return "Every part of the network is bound to its inputs or outputs: there is no unit that could leave it."
    included(step, structure.groups)
    return None


def prune_structured(step: StructuredPrune, context: Context) -> Details:
    """Takes units out and trains. Where an earlier attempt was cut off in a round, goes on in that one."""
    before = had(context.model)
    rounds = _Rounds(step, context)
    details = rounds.run()
    return details | remaining(before, context.model) | rounds.rows()


def included(step: TakesUnits, groups: Sequence[Group]) -> list[Group]:
    """Those of which no layer that makes them is excluded. Raises InvalidSpec for a pattern that matches none, and
    where none is left."""
    names = {group.name: _layers(group) for group in groups}
    for pattern in step.exclude:
        if not any(_matches(own, pattern) for own in names.values()):
            shown = ", ".join(own[0] for own in list(names.values())[:LAYERS_NAMED])
            raise InvalidSpec(f"exclude: {pattern!r} matches no layer that makes units. There are {shown}.")
    found = [group for group in groups if not any(_matches(names[group.name], own) for own in step.exclude)]
    if not found:
        raise InvalidSpec("exclude leaves no layer that makes units. Give fewer patterns.")
    return found


def _layers(group: Group) -> list[str]:
    return list(dict.fromkeys(cut.parameter.rpartition(".")[0] for cut in group.cuts if cut.made))


def _matches(layers: Sequence[str], pattern: str) -> bool:
    return any(matches(pattern, layer) for layer in layers)


def free_groups(step: TakesUnits, model: Model, structure: Structure) -> tuple[list[Group], dict[str, str]]:
    """Groups that may lose units, and by name why others may not. Raises Unsupported where none may, and InvalidSpec as
    `included` does."""
    sound, alone = standing(model.module, example_on(model.module, model, EXAMPLES), structure)
    if not sound:
        why = next(iter({**alone, **structure.kept_whole}.values()), "it has none")
        raise Unsupported(f"No unit can leave this network: {why}.")
    return included(step, sound), structure.kept_whole | alone


def structure_in(model: Model) -> Structure:
    """What a model's units hang together by."""
    return structure_of(model.module, example_on(model.module, model, EXAMPLES))


@dataclass
class _Done:
    """How far a step is, for a checkpoint: an edit of the structure a round, none in the training in front, the units
    that each group has, what the report says of that training, and how many layers were fitted again the last time."""

    edits: list[Edit] = field(default_factory=list)
    units: dict[str, int] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    reconstructed: int = 0


class _Rounds:
    """One step: what stays the same over its rounds, and how far it is."""

    def __init__(self, step: StructuredPrune, context: Context) -> None:
        self._step, self._context = step, context
        self._groups, self._alone = free_groups(step, context.model, structure_in(context.model))
        self._limit = limit_for(step, context, self._groups)
        self._least = least_of(step, self._groups)
        told = ((context.checkpoints and context.checkpoints.remembered()) or {}).get(KEPT)
        self._done = _Done(**told) if told else _Done(units={group.name: group.units for group in self._groups})
        self._parts = step.rounds + (step.lasso is not None)

    def run(self) -> Details:
        """Raises InvalidSpec for a budget that cannot be kept."""
        step, context, done = self._step, self._context, self._done
        self._train_dense()
        if done.edits:  # of an earlier attempt; their weights come with its checkpoint
            retake(context, done.edits)
        else:
            self._narrow(1)
        if step.training is None:
            return dict(done.dense)
        training, found = settle(context, step.training)
        found.pop(KEPT, None)
        for number in range(len(done.edits), step.rounds + 1):
            if number > len(done.edits):
                self._narrow(number)
            self._remember(found)
            summary = train(replace(context, progress=self._part(self._parts - step.rounds + number - 1)), training)
        return done.dense | found | summary.details()

    def rows(self) -> Details:
        """For each group what it had and has; and what is left alone, with the reason."""
        units = self._done.units
        rows: list[dict[str, float | int | str | None]] = [
            {"name": group.name, "units": group.units, "kept": units[group.name]} for group in self._groups
        ]
        details: Details = {"criterion": self._step.criterion, "scope": self._step.scope, "groups": rows}
        details["reconstructed_layers"] = self._done.reconstructed
        if self._alone:
            details["left_alone"] = [{"name": name, "why": why} for name, why in self._alone.items()]
        return details

    def _train_dense(self) -> None:
        """In front, with the penalty."""
        lasso = self._step.lasso
        if lasso is None or self._done.edits:
            return
        self._remember({})
        penalty = Lasso(self._context.model.module, self._groups, lasso.strength)
        summary = train(replace(self._context, progress=self._part(0)), lasso.training, penalty=penalty)
        self._done.dense = {"lasso_last_epoch_loss": summary.last_epoch_loss}

    def _narrow(self, number: int) -> None:
        """To the share of the round, in all processes alike."""
        context = self._context
        structure = structure_in(context.model)
        own = {group.name for group in self._groups}
        groups = [group for group in structure.groups if group.name in own]
        share = self._limit.share ** (number / self._step.rounds)
        if self._limit.measure == UNITS:  # a group of a single unit is none any more
            share -= (len(self._groups) - len(groups)) / self._limit.whole
        limit = replace(self._limit, share=share)

        def choose() -> tuple[Stay, Found]:
            """Which units stay, and what layers become without the others."""
            kept = chosen(self._step, context, structure, groups, limit, self._least)
            own = [one for one in groups if one.name in kept]
            module, _ = without(context.model.module, structure, own, kept)
            return kept, Renewal(self._step, context).of(module, left(structure, own, kept))

        kept, found = context.ranks.told(choose)
        module, edit = without(context.model.module, structure, [one for one in groups if one.name in kept], kept)
        module.load_state_dict(found, strict=False)
        take(context, module, [edit])
        self._done.edits.append(edit)
        self._done.reconstructed = fitted_layers(found)
        self._done.units |= {name: len(places) for name, places in kept.items()}

    def _remember(self, found: Details) -> None:
        if self._context.checkpoints is not None:
            self._context.checkpoints.remember({**found, KEPT: asdict(self._done)})

    def _part(self, number: int) -> Any:
        return functools.partial(_progress, self._context, number, self._parts)


def _progress(context: Context, number: int, parts: int, share: float) -> None:
    context.progress((number + share) / parts)
