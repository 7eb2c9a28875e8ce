"""Means of the weights along a training: exponential (EMA) and plain (SWA, Izmailov et al. 2018).

The arithmetic is that of torch.optim.swa_utils; its AveragedModel copies the module, which would not follow masks that
are imposed while it trains. Means are taken of the values behind constraints, so whatever is averaged, masks hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from app.contract.optimizing import Ema, Swa
from app.contract.training import Training
from worker.data.batch import Inputs
from worker.ranks.sharded import alike, local
from worker.training.states import State, check_alike, trained

Average = Callable[[tuple[Tensor, ...] | list[Tensor], tuple[Tensor, ...] | list[Tensor], Tensor | int], None]
"""Takes the means, the values to take in, and how many are in the means."""


class Averaged(ABC):
    """The running mean of a module's weights."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._means: dict[str, Tensor] = {}
        self.count = 0

    @abstractmethod
    def step(self, done: int) -> None:
        """Called after every step with how many are done."""

    def finish(self, inputs: Iterable[Inputs]) -> None:
        """Leaves the mean in the module. `inputs` are those of the training data, on the module's device."""
        if self.count:
            self._exchange()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Meanwhile the module has the weights that would be delivered."""
        yield

    def state(self) -> State:
        """What `load` needs."""
        return {"count": self.count, **{f"mean.{name}": mean for name, mean in self._means.items()}}

    def load(self, state: State) -> None:
        """Goes on from there."""
        saved = {name.removeprefix("mean."): value for name, value in state.items() if name != "count"}
        self.count = state["count"]
        if self.count:
            check_alike(self._current(), saved)
        current = self._current()
        self._means = {name: alike(value.to(self._device()), current[name]) for name, value in saved.items()}

    def _current(self) -> dict[str, Tensor]:
        """What is averaged: numbers with a fraction; counters stay those of the module."""
        return {name: tensor.detach() for name, tensor in trained(self._module) if tensor.is_floating_point()}

    def _update(self, average: Average) -> None:
        current = self._current()
        if not self.count:
            self._means = {name: tensor.clone() for name, tensor in current.items()}
        else:
            by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
            for name, tensor in current.items():
                means, values = by_dtype.setdefault(tensor.dtype, ([], []))
                means.append(local(self._means[name]))
                values.append(local(tensor))
            for means, values in by_dtype.values():
                average(means, values, self.count)
        self.count += 1

    def _exchange(self) -> None:
        """The module's weights and the means change places."""
        for name, tensor in self._current().items():
            own = tensor.clone()
            tensor.copy_(self._means[name])
            self._means[name] = own

    def _device(self) -> torch.device:
        return next(self._module.parameters()).device


class ExponentialMean(Averaged):
    """Follows every step; begins with the weights after the first."""

    def __init__(self, module: nn.Module, rule: Ema) -> None:
        super().__init__(module)
        self._decay = rule.decay

    def step(self, done: int) -> None:
        """The decay is held down at first, as TensorFlow's ExponentialMovingAverage does with `num_updates`."""
        self._update(get_ema_multi_avg_fn(min(self._decay, (1 + self.count) / (10 + self.count))))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The mean."""
        if self.count:
            self._exchange()
        try:
            yield
        finally:
            if self.count:
                self._exchange()


class StochasticMean(Averaged):
    """The mean of the weights at each `every`-th step behind the start, and the last. Validation sees the weights."""

    def __init__(self, module: nn.Module, rule: Swa, total: int, per_epoch: int) -> None:
        super().__init__(module)
        self._start, self._total = int(rule.start * total), total
        self._every = rule.every or per_epoch

    def step(self, done: int) -> None:
        """Takes the point in where it is one."""
        behind = done - self._start
        if behind > 0 and (behind % self._every == 0 or done == self._total):
            self._update(get_swa_multi_avg_fn())

    def finish(self, inputs: Iterable[Inputs]) -> None:
        """As in Averaged. BatchNorm's statistics are those of the mean, not the mean of statistics."""
        super().finish(inputs)
        update_bn(([each] for each in inputs), _Unpacking(self._module))


class _Unpacking(nn.Module):
    """Lets `update_bn`, which hands on one thing a batch, feed a network of several inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Inputs) -> Tensor:
        return cast(Tensor, self.inner(*inputs))


def averaged(module: nn.Module, training: Training, total: int, per_epoch: int) -> Averaged | None:
    """As the training asks for it."""
    match training.averaging:
        case Ema() as rule:
            return ExponentialMean(module, rule)
        case Swa() as rule:
            return StochasticMean(module, rule, total, per_epoch)
        case _:
            return None
