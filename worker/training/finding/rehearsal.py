"""A training on a copy of the model: what it teaches is used, and the copy thrown away."""

from __future__ import annotations

import copy
from dataclasses import replace

from app.contract.training import Settled
from worker.context import Context
from worker.data.feed import Feed
from worker.ranks.ranks import Ranks


def rehearsal(context: Context, feed: Feed | None = None) -> Context:
    """The context of such a training: its own module, masks and all, and nobody who is told how far it is.

    The seed is the job's: two settings see the same samples in the same order.
    """
    module = copy.deepcopy(context.model.module)
    return replace(
        context,
        model=replace(context.model, module=module),
        feed=feed or context.feed,
        progress=lambda share: None,
        checkpoints=None,
        ranks=Ranks(),
    )


def brief(training: Settled, steps: int) -> Settled:
    """The training in `steps` steps: its whole schedule, and nothing that rescues, averages or ends it early."""
    total = training.steps or 0
    changes = {
        "steps": steps,
        "epochs": None,
        "early_stopping": None,
        "averaging": None,
        "divergence_retries": 0,
        "warmup_steps": training.warmup_steps * steps // total if total else min(training.warmup_steps, steps // 10),
        "schedule": "constant" if training.schedule == "plateau" else training.schedule,
    }
    return training.model_copy(update=changes)
