"""Blocks, or connections, in the order in which they go, each with what it does to the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from app.contract.resizing import Resize
from app.contract.rewiring import Rewire
from worker.context import Context
from worker.data.batch import Batch, Inputs
from worker.structure.blocks import Block, bypassed, first_tensor
from worker.techniques.pruning.gradients import asked
from worker.techniques.pruning.samples import calibration
from worker.techniques.pruning.sensitivity import BATCH, drift
from worker.techniques.structure.influence_math import first_order, one_minus_cosine
from worker.techniques.structure.leaving import Influences, Order, Parts, PartT
from worker.training.loop import fed

MASK = "attention_mask"  # what transformers call the tokens that are no padding


def in_order(step: Resize | Rewire, context: Context, parts: Parts[PartT]) -> Order[PartT]:
    """Parts from the one without which the least is lost, as long as they may go. The context's network is what they
    are parts of. Raises DatasetMismatch where there is no data for the criterion."""
    if step.criterion == "greedy":
        return _greedy(context, parts, step.samples)
    looks = cosines if step.criterion == "cosine" else taylor
    return _sorted(parts, looks(context, parts, step.samples))


def _sorted(parts: Parts[PartT], influences: Influences) -> Order[PartT]:
    gone: list[PartT] = []
    for one in sorted(parts.free, key=lambda one: influences[one.name]):
        if parts.may_go(one, gone):
            gone.append(one)
            yield one, influences


def _greedy(context: Context, parts: Parts[PartT], samples: int) -> Order[PartT]:
    """One after the other that without which, and without those before, the outputs are nearest to what they were. What
    is known of a part is how far they moved when it was tried last."""
    moved = drift(context, samples, "Criterion greedy looks at outputs for data")
    gone: list[PartT] = []
    influences: Influences = {}
    while left := [one for one in parts.free if one not in gone and parts.may_go(one, gone)]:
        for one in left:
            influences[one.name] = _without(moved, parts, [*gone, one])
        gone.append(min(left, key=lambda one: influences[one.name]))
        context.progress(0.5 * len(gone) / len(parts.free))
        yield gone[-1], influences


def _without(moved: Callable[[], float], parts: Parts[PartT], gone: Sequence[PartT]) -> float:
    with parts.without(gone):
        return moved()


def cosines(context: Context, parts: Parts[PartT], samples: int) -> Influences:
    """The mean over samples of one minus the cosine between what is without each part and with it; labels are not
    needed."""
    task, noise = context.model.task, torch.Generator().manual_seed(context.seed)
    size = min(BATCH, task.evaluation_batch)
    given = calibration(context, size, samples, "Criterion cosine looks at what parts of the network do for data")
    totals, seen = dict.fromkeys((one.name for one in parts.free), 0.0), 0
    with torch.no_grad(), asked(context.model.module, []):
        for one in given:
            batch = task.prepare(one, noise)
            counted = _counted(context, batch.inputs)
            _, passed = parts.watched(batch.inputs)
            for name, (came, went) in passed.items():
                totals[name] += float(one_minus_cosine(came, went, counted).sum())
            seen += len(batch)
    return {name: total / seen for name, total in totals.items()}


def taylor(context: Context, parts: Parts[PartT], samples: int) -> Influences:
    """The mean over samples of how far a sample's loss would move without the part, to first order. Raises
    DatasetMismatch without labelled training data."""
    feed, module = fed(context.feed), context.model.module
    order, noise = (torch.Generator().manual_seed(context.seed) for _ in range(2))
    totals, seen = dict.fromkeys((one.name for one in parts.free), 0.0), 0
    with asked(module, list(module.parameters())):
        # One by one: the loss of several says nothing of each.
        for one in feed.batches("train", 1, shuffle=order, limit=samples):
            batch: Batch = feed.task.prepare(one, noise).to(context.device)
            output, passed = parts.watched(batch.inputs)
            loss = feed.task.loss(output, batch)
            gradients = torch.autograd.grad(loss, [went for _, went in passed.values()], allow_unused=True)
            for (name, (came, went)), gradient in zip(passed.items(), gradients, strict=True):
                if gradient is not None:
                    totals[name] += float(first_order(gradient, came.detach(), went.detach()).sum())
            seen += 1
    return {name: total / seen for name, total in totals.items()}


class OfBlocks:
    """Blocks as parts of a module: without one, what it takes is what it gives."""

    def __init__(self, module: nn.Module, free: Sequence[Block]) -> None:
        self._module, self.free = module, free

    def may_go(self, one: Block, gone: Sequence[Block]) -> bool:
        """Whether enough of its stack is left."""
        return one.count - sum(own.stack == one.stack for own in gone) > one.least

    def without(self, gone: Sequence[Block]) -> AbstractContextManager[None]:
        """They are bypassed."""
        return bypassed(gone)

    def watched(self, inputs: Inputs) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """What the module gives, and what each block takes and gives."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [one.module.register_forward_hook(self._see(one.name, found), with_kwargs=True) for one in self.free]
        try:
            return self._module(*inputs), found
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, name: str, found: dict[str, tuple[Tensor, Tensor]]) -> Any:
        def see(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            came, went = first_tensor((*given, *named.values())), first_tensor(output)
            assert came is not None
            assert went is not None
            found[name] = came, went

        return see


def _counted(context: Context, inputs: Inputs) -> Tensor | None:
    """Which tokens are no padding, where the model is told."""
    named = zip(context.model.facts.inputs, inputs, strict=True)
    return next((given.bool() for tensor, given in named if tensor.name == MASK), None)
