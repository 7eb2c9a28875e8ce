"""What settings are judged on: samples that their short trainings have not seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from app.contract.tasks import TASKS
from worker.context import Context
from worker.data.base import Data, Split
from worker.data.feed import Feed
from worker.data.splits import Part, divide

HELD_OUT = 0.1  # of the training samples, where there is no validation split
MOST = 2000  # samples: settings differ by more than what more of them would tell


def judged(context: Context) -> Feed:
    """A feed with the splits `train` and `validation`, labelled both; `validation` has at most 2,000 samples.

    Without a labelled validation split, a tenth of the training samples is held out: their training is not the real
    one, which sees all of them.
    """
    assert context.feed is not None
    data = context.feed.data
    train = data.splits["train"]
    validation = data.splits.get("validation")
    labelled = validation is not None and TASKS[context.model.facts.task].labelled(
        data.facts.splits["validation"].targets
    )
    if validation is None or not labelled or len(validation) == 0:
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
