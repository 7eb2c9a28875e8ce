"""What settings are judged on: samples that their short trainings have not seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from app.contract.tasks import TASKS
from worker.context import Context
from worker.data.base import Data, Split
from worker.data.feed import Feed
from worker.data.splits import MIN_SAMPLES, Part, divide

HELD_OUT = 0.1  # of the training samples, where there is no validation split
MOST = 2000  # samples: settings differ by more than what more of them would tell


def judged(context: Context) -> Feed | None:
    """A feed with the splits `train` and `validation`; the latter is labelled and has at most 2,000 samples.

    Without a labelled validation split, a tenth of the training samples is held out: their training is not the real
    one, which sees all of them. None where these have no labels either: a student may learn from its teacher alone, but
    not be judged by it.
    """
    assert context.feed is not None
    data = context.feed.data
    labelled = TASKS[context.model.facts.task].labelled
    train = data.splits["train"]
    validation = data.splits.get("validation")
    if validation is None or len(validation) == 0 or not labelled(data.facts.splits["validation"].targets):
        if not labelled(data.facts.splits["train"].targets) or len(train) < MIN_SAMPLES:
            return None
        rows = divide(len(train), train.classes(), HELD_OUT, 0, context.seed)
        validation, train = Part(train, rows["validation"]), Part(train, rows["train"])
    return _fed(context, data, {"train": train, "validation": _some(validation, context.seed)})


def _some(split: Split, seed: int) -> Split:
    if len(split) <= MOST:
        return split
    return Part(split, np.sort(np.random.RandomState(seed).permutation(len(split))[:MOST]))


def _fed(context: Context, data: Data, splits: dict[str, Split]) -> Feed:
    """Facts of a split that was cut out are those of the whole: nobody asks them for its size."""
    facts = {name: data.facts.splits.get(name, data.facts.splits["train"]) for name in splits}
    return Feed(context.model, replace(data, facts=data.facts.model_copy(update={"splits": facts}), splits=splits))
