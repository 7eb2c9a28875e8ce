"""The loss of a process's share of a batch, and the gradients of the whole batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from app.contract.errors import Unsupported
from worker.data.batch import Batch
from worker.ranks.batch_norm import Synchronized
from worker.ranks.ranks import Ranks
from worker.ranks.sharded import Shards
from worker.training.objective import Objective


class Lesson:
    """What a step lowers, in one process or in one of several."""

    def __init__(self, module: nn.Module, objective: Objective, ranks: Ranks) -> None:
        self.objective, self._ranks = objective, ranks
        self._module = module
        self._statistics = Synchronized(module, ranks)
        self._all: nn.Module | None = None
        self._heard = nn.Parameter(torch.zeros(()))
        self._names: list[str] = []

    def __call__(self, part: Batch, share: float) -> Tensor:
        """The loss of a part, times its share of the whole batch, times the processes: they take the mean."""
        if self._ranks.size == 1:
            return self.objective(part) * share if share != 1 else self.objective(part)
        with self._statistics.installed():
            loss: Tensor = self._together()(part, share * self._ranks.size)
        return loss

    def unsummed(self) -> AbstractContextManager[None]:
        """Around the passes of a part that others follow: gradients are summed over processes with the last one's."""
        return nullcontext() if self._ranks.size == 1 else self._ranks.unsummed(self._together())

    def _together(self) -> nn.Module:
        """Made anew where a weight has come under a constraint: it is told no more of the gradients of such."""
        names = [name for name, _ in self._module.named_parameters()]
        if self._all is None or names != self._names:
            together = _Together(self._module, self.objective, self._statistics)
            self._all, self._heard, self._names = self._ranks.replicated(together), together.heard, names
        return self._all

    def begin(self) -> None:
        """A step begins: the gradient of the one before is gone."""
        if self._all is not None:
            self._heard.grad = None

    def whole(self, value: float, scale: float) -> float:
        """The loss of the whole batch, out of what this process has of it; `scale` is what losses were times."""
        if self._ranks.size == 1:
            return value
        assert self._heard.grad is not None
        return self._heard.grad.item() / scale


class ShardedLesson(Lesson):
    """The same where weights are shared out: gradients come to where the weights are."""

    def __init__(self, objective: Objective, ranks: Ranks, shards: Shards) -> None:
        """Raises Unsupported for a loss that learns something itself, which would not be shared out."""
        super().__init__(shards.module, objective, ranks)
        self._shards = shards
        if objective.learns:
            raise Unsupported("Projections of hidden states are learned beside the model, and cannot be sharded.")

    def __call__(self, part: Batch, share: float) -> Tensor:
        self._statistics.counts = not part.stand_in
        with self._statistics.installed():
            loss = self.objective(part)
        # All processes pass through the network equally often. A mean over nothing is no number.
        return (loss if share else loss.nan_to_num()) * share * self._ranks.size

    def unsummed(self) -> AbstractContextManager[None]:
        return self._shards.unsummed()

    def begin(self) -> None:
        """Nothing of a step stays in it."""

    def whole(self, value: float, scale: float) -> float:
        return self._ranks.total(torch.tensor(value, dtype=torch.float64)).item() / self._ranks.size


def lesson_of(module: nn.Module, objective: Objective, ranks: Ranks, shards: Shards | None = None) -> Lesson:
    """The lesson of a module as it is held."""
    return Lesson(module, objective, ranks) if shards is None else ShardedLesson(objective, ranks, shards)


class _Together(nn.Module):
    """All that learns, in one module whose forward is the loss: what DistributedDataParallel wraps."""

    def __init__(self, module: nn.Module, objective: Objective, statistics: Synchronized) -> None:
        super().__init__()
        self.module, self.learned = module, objective.modules
        self._objective, self._statistics = objective, statistics
        # Its gradient is the loss, which so comes along with the gradients of all processes.
        self.heard = nn.Parameter(torch.zeros(()))
        # DistributedDataParallel looks for weights that a batch does not reach, and complains where it finds none.
        self.unreached = nn.Parameter(torch.zeros(()))

    def forward(self, part: Batch, share: float) -> Tensor:
        if share == 0 and not self._statistics.layers:
            # Its gradient is zero. The loss itself may be none: a mean over nothing.
            return torch.stack([(weight * 0).sum() for weight in self.parameters() if weight.requires_grad]).sum()
        self._statistics.counts = not part.stand_in
        loss = self._objective(part) * share
        return loss + self.heard * loss.detach()
