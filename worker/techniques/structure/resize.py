"""Resizing: blocks or connections leave the network, those that do the least, or all layers become narrower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import fx, nn

from app.contract.errors import InvalidSpec, Unsupported
from app.contract.resizing import Resize
from app.contract.rewiring import Rewire
from app.contract.widths import ResizeWidth
from worker.context import Context
from worker.model import Model
from worker.structure import depth
from worker.structure.blocks import Block, Blocks, blocks, bypassed, kept_without, passed, same, varied
from worker.structure.depth import guessed
from worker.structure.dropping import dropped, shortened
from worker.structure.patterns import matches
from worker.structure.restructured import restructure, take
from worker.techniques.base import Details
from worker.techniques.pruning.weights import LAYERS_NAMED
from worker.techniques.structure import rewire, structured
from worker.techniques.structure.influence import OfBlocks, in_order
from worker.techniques.structure.leaving import Choice, shown, so_many, told, within
from worker.techniques.structure.limits import had, limit_of, measured, remaining
from worker.techniques.structure.width import resize_width
from worker.training.finding.settle import settle
from worker.training.loop import train


class ResizeTechnique:
    """Leaves blocks or connections out, or units: what comes out is a shallower or narrower network."""

    name: ClassVar[str] = "resize"

    def applies(self, step: Resize | ResizeWidth | Rewire, model: Model) -> str | None:
        """A network needs something that may go. Raises InvalidSpec where `exclude` matches none, or leaves none."""
        if isinstance(step, ResizeWidth):
            return structured.applies(step, model)
        if not model.facts.trainable:
            return model.facts.untrainable_reason
        if isinstance(step, Rewire):
            return rewire.applies(step, model)
        if model.facts.format in ("pt2", "onnx") or isinstance(model.module, fx.GraphModule):
            return (
                "A graph holds no blocks that could be left out. Its residual branches can go, which are what blocks "
                'add: give "method": "connections".'
            )
        found = blocks(model)
        if not found.found:
            return _none(found)
        included(step, found)
        return None

    def apply(self, step: Resize | ResizeWidth | Rewire, context: Context) -> Details:
        """Chooses what goes, leaves it out, and trains where the step says so."""
        if isinstance(step, ResizeWidth):
            return resize_width(step, context)
        details = rewire.rewired(step, context) if isinstance(step, Rewire) else _shortened(step, context)
        if step.training is None:
            return details
        training, settled = settle(context, step.training)
        return details | settled | train(context, training).details()


def _shortened(step: Resize, context: Context) -> Details:
    found = blocks(context.model)
    free = included(step, found)
    choice = context.ranks.told(lambda: _chosen(step, context, free))
    return _drop(step, context, found, free, choice)


def included(step: Resize, found: Blocks) -> list[Block]:
    """Those that no pattern keeps. Raises InvalidSpec for one that matches no block, and where none is left."""
    for pattern in step.exclude:
        if not any(_matches(one, pattern) for one in found.found) and not any(
            matches(pattern, name) for name in found.kept
        ):
            raise InvalidSpec(f"exclude: {pattern!r} matches no block. There are {shown(found.found)}.")
    left = [one for one in found.found if not any(_matches(one, pattern) for pattern in step.exclude)]
    if not left:
        raise InvalidSpec(f"exclude leaves none of the blocks {shown(found.found)}. Give fewer patterns.")
    return left


def _matches(block: Block, pattern: str) -> bool:
    """Whether the pattern is for the block, for what it lies in, or for a layer or a weight in it."""
    inside = [name for name, _ in block.module.named_modules()] + [name for name, _ in block.module.named_parameters()]
    return any(matches(pattern, f"{block.name}.{name}".rstrip(".")) for name in inside)


def _none(found: Blocks) -> str:
    why = "".join(f" {name}: {reason}." for name, reason in list(found.kept.items())[:LAYERS_NAMED])
    return "The model has no block that gives the shape that it takes and could be left out." + why


def _chosen(step: Resize, context: Context, free: Sequence[Block]) -> Choice:
    """Raises InvalidSpec, with what is reachable, where too few may go."""
    model = context.model
    order = in_order(step, context, OfBlocks(model.module, free))
    if step.budget is None:
        assert step.layers is not None
        return so_many(step.layers, order, "blocks")
    limit = limit_of(step.budget, model)
    return within(limit, order, lambda gone: left_of(limit.measure, model, gone), "blocks")


def left_of(measure: str, model: Model, gone: Sequence[Block]) -> int:
    """Parameters, MACs of a sample, or bytes of the tensors of the network without these blocks."""
    module = model.module
    names = {own: name for name, own in module.named_parameters()}
    kept = kept_without(module, gone)
    with shortened(module, kept, guessed(module, kept)):
        if measure != "bytes":
            return measured(measure, model)
        dtypes = model.dtypes
        return sum(own.numel() * dtypes.get(names[own], own.dtype).itemsize for own in module.parameters())


def _drop(step: Resize, context: Context, found: Blocks, free: Sequence[Block], choice: Choice) -> Details:
    """The same in all processes."""
    model = context.model
    before = had(model)
    gone = [one for one in free if one.name in choice.gone]
    kept = kept_without(model.module, gone)
    edit = dropped(kept, depth.told(model, kept))
    shorter = restructure(context, [edit])
    _check(model, shorter, gone)
    take(context, shorter, [edit])
    context.ranks.alike(parameter.data for parameter in context.model.module.parameters())
    details: Details = {
        "method": step.method, "criterion": step.criterion, "blocks_before": len(found.found),
        "dropped_blocks": len(choice.gone),
    }  # fmt: skip
    return details | remaining(before, context.model) | told(found.found, found.kept, choice, "blocks", "dropped")


def _check(model: Model, shorter: nn.Module, gone: Sequence[Block]) -> None:
    """Each block was tried alone, or one like it. Raises Unsupported where the network is another one without all."""
    inputs = varied(model)
    with bypassed(gone):
        wanted = passed(model.module, inputs)
    if not same(passed(shorter, inputs), wanted):
        raise Unsupported(
            f"Without {shown(gone)} the network computes something else than what was measured: what stays goes by "
            "its place. Exclude some, or ask for fewer."
        )
