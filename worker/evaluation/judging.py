"""The task's metric on the validation split: what steps judge by that look for the least that holds it."""

from __future__ import annotations

from torch import nn

from app.contract.errors import DatasetMismatch
from app.contract.tasks import TASKS
from worker.context import Context
from worker.objectives.base import Forward

SPLIT = "validation"


class Judge:
    """Of one job. Figures are such that higher is better; `shown` gives them in the metric's own sign.

    `what` is named where there is nothing to judge by.
    """

    def __init__(self, context: Context, what: str) -> None:
        self._context, self._what = context, what
        self._sign = 1 if TASKS[context.model.facts.task].higher_is_better else -1

    def __call__(self, forward: Forward) -> float:
        """The metric of what takes inputs that lie on the CPU. Raises DatasetMismatch without a labelled split."""
        feed = self._context.feed
        if feed is None or SPLIT not in feed.data.splits:
            raise DatasetMismatch(f"{self._what} judges by a labelled `{SPLIT}` split.", pointer="/dataset")
        return self._sign * feed.score(forward, SPLIT)[0]

    def module(self, module: nn.Module) -> float:
        """The metric of a module on the job's device, which is in eval mode from then on."""
        module.eval()
        device = self._context.device
        return self(lambda inputs: module(*(tensor.to(device) for tensor in inputs)))

    def wanted(self, drop: float) -> float:
        """The uploaded model's metric less what it may lose."""
        return self.module(self._context.teacher) - drop

    def shown(self, metric: float) -> float:
        """As the metric is reported."""
        return self._sign * metric
