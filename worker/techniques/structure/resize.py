"""Resizing: whole blocks leave the network, those that do the least, or all layers become narrower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import nn

from app.contract.errors import InvalidSpec, Unsupported
from app.contract.resizing import Resize
from app.contract.widths import ResizeWidth
from worker.context import Context
from worker.model import Model
from worker.structure.blocks import Block, Blocks, blocks, bypassed, kept_without, passed, same, varied
from worker.structure.depth import guessed, told
from worker.structure.dropping import dropped, shortened
from worker.structure.restructured import restructure, take
from worker.techniques.base import Details
from worker.techniques.pruning.weights import LAYERS_NAMED
from worker.techniques.structure import structured
from worker.techniques.structure.influence import Influences, Order, in_order
from worker.techniques.structure.limits import Limit, had, limit_of, measured, remaining
from worker.techniques.structure.width import resize_width
from worker.training.finding.settle import settle
from worker.training.loop import train


@dataclass(frozen=True)
class Choice:
    """The blocks that go, by name, and what each does."""

    gone: tuple[str, ...]
    influences: Influences


class ResizeTechnique:
    """Leaves blocks out, and what comes out is a shallower network of the same kind; or units, for a narrower one."""

    name: ClassVar[str] = "resize"

    def applies(self, step: Resize | ResizeWidth, model: Model) -> str | None:
        """A network needs a block, or units, that may go. Raises InvalidSpec where `exclude` matches none, or leaves
        none."""
        if isinstance(step, ResizeWidth):
            return structured.applies(step, model)
        if not model.facts.trainable:
            return model.facts.untrainable_reason
        if model.facts.format in ("pt2", "onnx"):
            return (
                "A graph holds no blocks that could be left out. Upload the network as an architecture or as a folder "
                "of transformers."
            )
        found = blocks(model)
        if not found.found:
            return _none(found)
        included(step, found)
        return None

    def apply(self, step: Resize | ResizeWidth, context: Context) -> Details:
        """Chooses what goes, leaves it out, and trains where the step says so."""
        if isinstance(step, ResizeWidth):
            return resize_width(step, context)
        found = blocks(context.model)
        free = included(step, found)
        choice = context.ranks.told(lambda: _chosen(step, context, free))
        details = _drop(step, context, found, free, choice)
        if step.training is None:
            return details
        training, settled = settle(context, step.training)
        return details | settled | train(context, training).details()


def included(step: Resize, found: Blocks) -> list[Block]:
    """Those that no pattern keeps. Raises InvalidSpec for one that matches no block, and where none is left."""
    for pattern in step.exclude:
        if not any(_matches(one, pattern) for one in found.found) and not any(
            fnmatchcase(name, pattern) for name in found.kept
        ):
            raise InvalidSpec(f"exclude: {pattern!r} matches no block. There are {_names(found.found)}.")
    left = [one for one in found.found if not any(_matches(one, pattern) for pattern in step.exclude)]
    if not left:
        raise InvalidSpec(f"exclude leaves none of the blocks {_names(found.found)}. Give fewer patterns.")
    return left


def _matches(block: Block, pattern: str) -> bool:
    """Whether the pattern is for the block, for what it lies in, or for a layer or a weight in it."""
    parts = block.name.split(".")
    names = [".".join(parts[: count + 1]) for count in range(len(parts))]
    inside = [name for name, _ in block.module.named_modules()] + [name for name, _ in block.module.named_parameters()]
    return any(fnmatchcase(name, pattern) for name in (*names, *(f"{block.name}.{name}" for name in inside)))


def _names(found: Sequence[Block]) -> str:
    more = f" and {len(found) - LAYERS_NAMED} more" if len(found) > LAYERS_NAMED else ""
    return ", ".join(one.name for one in found[:LAYERS_NAMED]) + more


def _none(found: Blocks) -> str:
    why = "".join(f" {name}: {reason}." for name, reason in list(found.kept.items())[:LAYERS_NAMED])
    return "The model has no block that gives the shape that it takes and could be left out." + why


def _chosen(step: Resize, context: Context, free: Sequence[Block]) -> Choice:
    """Raises InvalidSpec, with what is reachable, where too few may go."""
    order = in_order(step, context, free)
    if step.budget is None:
        assert step.layers is not None
        return _so_many(step.layers, order)
    return _within(limit_of(step.budget, context.model), order, context.model)


def _so_many(layers: int, order: Order) -> Choice:
    gone: list[str] = []
    for block, influences in order:
        gone.append(block.name)
        if len(gone) == layers:
            return Choice(tuple(gone), dict(influences))
    raise InvalidSpec(f"{len(gone)} blocks may go, and {layers} are asked for. Give fewer layers, or exclude less.")


def _within(limit: Limit, order: Order, model: Model) -> Choice:
    """The fewest in this order."""
    gone: list[Block] = []
    left = limit.whole
    for block, influences in order:
        gone.append(block)
        left = left_of(limit.measure, model, gone)
        if left <= limit.most:
            return Choice(tuple(one.name for one in gone), dict(influences))
    raise InvalidSpec(
        f"Without all {len(gone)} blocks that may go {left / limit.whole:.1%} of the {limit.measure} are left, and the "
        f"budget is {limit.share:.1%}. Give a larger one, or exclude less."
    )


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
    edit = dropped(kept, told(model, kept))
    shorter = restructure(context, [edit])
    _check(model, shorter, gone)
    take(context, shorter, [edit])
    context.ranks.alike(parameter.data for parameter in context.model.module.parameters())
    details: Details = {
        "method": step.method, "criterion": step.criterion, "blocks_before": len(found.found),
        "dropped_blocks": len(choice.gone),
    }  # fmt: skip
    return details | remaining(before, context.model) | _rows(found, choice)


def _check(model: Model, shorter: nn.Module, gone: Sequence[Block]) -> None:
    """Each block was tried alone, or one like it. Raises Unsupported where the network is another one without all."""
    inputs = varied(model)
    with bypassed(gone):
        wanted = passed(model.module, inputs)
    if not same(passed(shorter, inputs), wanted):
        raise Unsupported(
            f"Without {_names(gone)} the network computes something else than what was measured: what stays goes by "
            "its place. Exclude some, or ask for fewer."
        )


def _rows(found: Blocks, choice: Choice) -> Details:
    """What each block does and whether it is gone; and what could not go, with the reason."""
    rows: list[dict[str, float | int | str | None]] = [
        {"name": one.name, "influence": choice.influences.get(one.name), "dropped": int(one.name in choice.gone)}
        for one in found.found
    ]
    details: Details = {"blocks": rows}
    if found.kept:
        details["left_alone"] = [{"name": name, "why": why} for name, why in found.kept.items()]
    return details
