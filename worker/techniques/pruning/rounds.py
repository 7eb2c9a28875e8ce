"""Iterative pruning with rewinding: after each round the training begins anew (Renda, Frankle & Carbin 2020)."""

from __future__ import annotations

import functools
from dataclasses import replace

from app.contract.pruning import Prune
from worker.context import Context
from worker.techniques.base import Details
from worker.techniques.pruning.choosing import Chooser
from worker.techniques.pruning.growing import way
from worker.techniques.pruning.weights import WeightSet
from worker.training.finding.settle import settle
from worker.training.loop import train
from worker.training.states import load_module, module_state


def prune_in_rounds(step: Prune, context: Context, chooser: Chooser, weights: WeightSet) -> Details:
    """Prunes and trains, round by round. Where an earlier attempt was cut off in a round, goes on in that one."""
    assert step.training is not None
    module = context.model.module
    start = {name: tensor.clone() for name, tensor in module_state(module).items()}
    # Of an attempt that was cut off in the round behind them.
    earlier = ((context.checkpoints and context.checkpoints.remembered()) or {}).get("rounds")
    training, found = settle(context, step.training)
    found.pop("rounds", None)
    rows: list[dict[str, float | int | str | None]] = list(earlier or [])
    first = len(rows)
    for number in range(first, step.rounds):
        if earlier is None or number > first:
            if number and step.rewind == "weights":
                load_module(module, start)
            chooser.prune(way(step, chooser, number + 1))
        else:  # the checkpoint has the masks; it expects parameters in the order in which masks put them
            weights.drop([~mask for mask in weights.kept()])
        if context.checkpoints is not None:
            context.checkpoints.remember(found | {"rounds": list(rows)})
        share = functools.partial(_progress, context, number, step.rounds)
        summary = train(replace(context, progress=share), training)
        rows.append(
            {
                "round": number + 1,
                "sparsity": weights.removed() / weights.total(),
                "last_epoch_loss": summary.last_epoch_loss,
                "best_validation_metric": summary.best_validation_metric,
            }
        )
    return found | {"rounds": rows} | summary.details()


def _progress(context: Context, number: int, rounds: int, share: float) -> None:
    context.progress((number + share) / rounds)
