"""Blocks in the order in which they go, each with what it does to the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from app.contract.resizing import Resize
from worker.context import Context
from worker.data.batch import Batch, Inputs
from worker.structure.blocks import Block, bypassed, first_tensor
from worker.techniques.pruning.gradients import asked
from worker.techniques.pruning.samples import calibration
from worker.techniques.pruning.sensitivity import BATCH, drift
from worker.techniques.structure.influence_math import first_order, one_minus_cosine
from worker.training.loop import fed

MASK = "attention_mask"  # what transformers call the tokens that are no padding
Influences = dict[str, float]
"""By a block's name."""
Order = Iterator[tuple[Block, Influences]]
"""The next block to go, and what blocks do as far as is known by then."""


def in_order(step: Resize, context: Context, blocks: Sequence[Block]) -> Order:
    """Blocks from the one without which the least is lost, as long as their stacks may lose one. Raises DatasetMismatch
    where there is no data for the criterion."""
    if step.criterion == "greedy":
        return _greedy(context, blocks, step.samples)
    looks = cosines if step.criterion == "cosine" else taylor
    return _sorted(blocks, looks(context, blocks, step.samples))


def _sorted(blocks: Sequence[Block], influences: Influences) -> Order:
    gone: list[Block] = []
    for block in sorted(blocks, key=lambda one: influences[one.name]):
        if _may_go(block, gone):
            gone.append(block)
            yield block, influences


def _greedy(context: Context, blocks: Sequence[Block], samples: int) -> Order:
    """One after the other that without which, and without those before, the outputs are nearest to what they were. What
    is known of a block is how far they moved when it was tried last."""
    told = drift(context, samples, "Criterion greedy looks at outputs for data")
    gone: list[Block] = []
    influences: Influences = {}
    while left := [one for one in blocks if one not in gone and _may_go(one, gone)]:
        for one in left:
            influences[one.name] = _without(told, [*gone, one])
        gone.append(min(left, key=lambda one: influences[one.name]))
        context.progress(0.5 * len(gone) / len(blocks))
        yield gone[-1], influences


def _may_go(block: Block, gone: Sequence[Block]) -> bool:
    """Whether enough of its stack is left."""
    return block.count - sum(one.stack == block.stack for one in gone) > block.least


def _without(told: Callable[[], float], gone: Sequence[Block]) -> float:
    with bypassed(gone):
        return told()


def cosines(context: Context, blocks: Sequence[Block], samples: int) -> Influences:
    """The mean over samples of one minus the cosine between what each block takes and gives; labels are not needed."""
    task, noise = context.model.task, torch.Generator().manual_seed(context.seed)
    size = min(BATCH, task.evaluation_batch)
    given = calibration(context, size, samples, "Criterion cosine looks at what blocks do for data")
    totals, seen = dict.fromkeys((one.name for one in blocks), 0.0), 0
    module = context.model.module
    with torch.no_grad(), asked(module, []):
        for one in given:
            batch = task.prepare(one, noise)
            counted = _counted(context, batch.inputs)
            with _seeing(blocks) as passed:
                module(*batch.inputs)
            for name, (came, went) in passed.items():
                totals[name] += float(one_minus_cosine(came, went, counted).sum())
            seen += len(batch)
    return {name: total / seen for name, total in totals.items()}


def taylor(context: Context, blocks: Sequence[Block], samples: int) -> Influences:
    """The mean over samples of how far a sample's loss would move without the block, to first order. Raises
    DatasetMismatch without labelled training data."""
    feed, module = fed(context.feed), context.model.module
    order, noise = (torch.Generator().manual_seed(context.seed) for _ in range(2))
    totals, seen = dict.fromkeys((one.name for one in blocks), 0.0), 0
    with asked(module, list(module.parameters())):
        # One by one: the loss of several says nothing of each.
        for one in feed.batches("train", 1, shuffle=order, limit=samples):
            batch: Batch = feed.task.prepare(one, noise).to(context.device)
            with _seeing(blocks) as passed:
                loss = feed.task.loss(module(*batch.inputs), batch)
            gradients = torch.autograd.grad(loss, [went for _, went in passed.values()], allow_unused=True)
            for (name, (came, went)), gradient in zip(passed.items(), gradients, strict=True):
                if gradient is not None:
                    totals[name] += float(first_order(gradient, came.detach(), went.detach()).sum())
            seen += 1
    return {name: total / seen for name, total in totals.items()}


@contextmanager
def _seeing(blocks: Sequence[Block]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within it, what each block takes and gives."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def see(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            came, went = first_tensor((*given, *named.values())), first_tensor(output)
            assert came is not None
            assert went is not None
            found[name] = came, went

        return see

    hooks = [one.module.register_forward_hook(hook(one.name), with_kwargs=True) for one in blocks]
    try:
        yield found
    finally:
        for one in hooks:
            one.remove()


def _counted(context: Context, inputs: Inputs) -> Tensor | None:
    """Which tokens are no padding, where the model is told."""
    named = zip(context.model.facts.inputs, inputs, strict=True)
    return next((given.bool() for tensor, given in named if tensor.name == MASK), None)
