"""How much each layer minds being pruned, or rounded: measured, a layer and a degree at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from worker.constraints import stored
from worker.context import Context
from worker.data.batch import Batch
from worker.techniques.pruning.samples import calibration
from worker.techniques.pruning.walk import Shortcut
from worker.techniques.pruning.weights import PrunableWeight

LEVELS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
BATCH = 64
MOST_HELD = 1 << 30  # bytes of outputs: of a language model each token's are as long as its vocabulary

Curve = list[float]
"""By how much the outputs diverge at each of LEVELS."""


def curves(
    context: Context, weights: list[PrunableWeight], dropped: Callable[[int, float], Tensor], samples: int
) -> list[Curve]:
    """For each weight and level: by how much the outputs diverge where only this weight is pruned to that level.

    `dropped(number, level)` says what would go (bool, of the weight's shape). Raises DatasetMismatch without data.
    """

    with measuring(context, weights, samples, "Scope auto measures the layers on data") as curve:
        found = []
        for number, weight in enumerate(weights):
            value = weight.value()
            found.append(curve(weight, (value.masked_fill(dropped(number, level), 0.0) for level in LEVELS)))
        return found


@contextmanager
def measuring(
    context: Context, weights: list[PrunableWeight], samples: int, why: str
) -> Iterator[Callable[[PrunableWeight, Iterable[Tensor]], Curve]]:
    """Within it, what measures one of `weights`: for each of some values of it how far the outputs are from those of
    the network as it is, by the task's divergence (Kullback-Leibler for classes, squared error for values), where only
    this weight has these values.

    Needs no labels. The network is left as it was. Raises DatasetMismatch, saying `why` it is needed, without data.
    """
    module = context.model.module
    training = module.training
    batches = held_batches(context, samples, why)
    try:
        with torch.no_grad():
            passes = Shortcut(module, [batch.inputs for batch in batches], [weight.owner for weight in weights])
            usual = [passes.run(number) for number in range(len(batches))]

            def curve(weight: PrunableWeight, values: Iterable[Tensor]) -> Curve:
                passes.begin_at(weight.owner)
                return [_one(context, weight, value, batches, usual, passes) for value in values]

            yield curve
    finally:
        module.train(training)


def drift(context: Context, samples: int, why: str) -> Callable[..., float]:
    """What measures how far the network's outputs are, when it is called, from what they are now; or those of another
    in eval mode that is handed to it.

    Raises DatasetMismatch, saying `why` it is needed, without data.
    """
    return drift_on(context, _evaluated(context, samples, why))


def drift_on(context: Context, batches: Sequence[Batch]) -> Callable[..., float]:
    """The same on some samples, as many as their outputs leave room for."""
    task, own = context.model.task, context.model.module.eval()
    batches = _with_room(context, batches)
    with torch.no_grad():
        usual = [own(*batch.inputs) for batch in batches]

    def measured(module: nn.Module = own) -> float:
        with torch.no_grad():
            pairs = zip(batches, usual, strict=True)
            told = [len(one) * float(task.divergence(module(*one.inputs), before, one, 1.0)) for one, before in pairs]
        return sum(told) / sum(map(len, batches))

    return measured


def _one(
    context: Context,
    weight: PrunableWeight,
    value: Tensor,
    batches: list[Batch],
    usual: list[Tensor],
    passes: Shortcut,
) -> float:
    parameter = stored(weight.owner, weight.attribute)
    values = parameter.detach().clone()
    task = context.model.task
    try:
        parameter.copy_(value)
        told = [
            len(batch) * float(task.divergence(passes.run(number), before, batch, 1.0))
            for number, (batch, before) in enumerate(zip(batches, usual, strict=True))
        ]
    finally:
        parameter.copy_(values)
    return sum(told) / sum(map(len, batches))


def looked_at(context: Context, samples: int, why: str) -> int:
    """How many of so many samples layers are measured on: fewer where outputs are long. Raises as `measuring` does."""
    return sum(map(len, held_batches(context, samples, why)))


def held_batches(context: Context, samples: int, why: str) -> list[Batch]:
    """Samples, prepared, as many as their outputs leave room for. Raises as `measuring` does."""
    return _with_room(context, _evaluated(context, samples, why))


def _evaluated(context: Context, samples: int, why: str) -> list[Batch]:
    return prepared(context, min(BATCH, context.model.task.evaluation_batch), samples, why)


def prepared(context: Context, size: int, samples: int, why: str) -> list[Batch]:
    """Batches of samples as the task evaluates them. Raises as `measuring` does."""
    noise = torch.Generator().manual_seed(context.seed)
    return [context.model.task.prepare(batch, noise) for batch in calibration(context, size, samples, why)]


def _with_room(context: Context, batches: Sequence[Batch]) -> list[Batch]:
    with torch.no_grad():
        outputs: Tensor = context.model.module.eval()(*batches[0].inputs)
    return list(batches[: max(1, MOST_HELD // max(1, outputs.nbytes))])
