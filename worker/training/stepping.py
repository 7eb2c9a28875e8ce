"""One step of a training: the gradient of a batch, in parts where it is to be, and the optimizer's move."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from app.contract.training import Settled
from worker.data.batch import Batch
from worker.objectives.base import Task
from worker.training import optimizers, precision
from worker.training.divergence import Diverged
from worker.training.objective import Objective
from worker.training.states import State, Unusable


class Stepper:
    """Takes steps. `norm` of the gradients is clipped, parts of a batch are added up, passes are cast."""

    def __init__(
        self, module: nn.Module, task: Task, objective: Objective, training: Settled, device: torch.device
    ) -> None:
        self.optimizer = optimizers.build(module, training, objective.parameters())
        self._task, self._objective, self._training, self._device = task, objective, training, device
        self._dtype = precision.dtype_of(training.precision, device)
        self._scaler = precision.scaler(self._dtype, device)
        # The batch's own dimension shrinks, and BatchNorm takes no batch of one.
        self._smallest = 2 if any(isinstance(layer, _BatchNorm) for layer in module.modules()) else 1

    def step(self, batch: Batch, lr: float) -> float:
        """Moves the weights; the loss of the batch. Raises Diverged, before the move, where it is not finite.

        Cut into parts, the gradient is that of the whole batch but for rounding, since each part counts by its share
        of what the task's loss is a mean over: samples, or targets that count. It is not where samples of a batch have
        to do with each other (BatchNorm, losses that compare samples), and dropout draws other numbers.
        """
        self.optimizer.zero_grad()
        optimizers.set_rate(self.optimizer, lr)
        value = 0.0
        for part, share in self._parts(batch):
            with precision.autocast(self._dtype, self._device):
                loss = self._objective(part) * share if share != 1 else self._objective(part)
            self._scaler.scale(loss).backward()
            value += loss.item()
        if not math.isfinite(value):
            raise Diverged(f"The training loss became {value}")
        self._move()
        return value

    @property
    def precision(self) -> str:
        """What passes are computed in: float32, bfloat16 or float16."""
        return str(self._dtype).removeprefix("torch.")

    def state(self) -> State:
        """What `load` needs: tensors of the optimizer by the number of the parameter."""
        state: State = {"scaler": self._scaler.state_dict()}
        for number, own in self.optimizer.state_dict()["state"].items():
            state.update({f"{number}.{name}": value for name, value in own.items()})
        return state

    def load(self, state: State) -> None:
        """Goes on from there. Raises Unusable for the state of other parameters."""
        whole = self.optimizer.state_dict()
        whole["state"] = {}
        try:
            for name, value in state.items():
                if name != "scaler":
                    number, key = name.split(".", 1)
                    whole["state"].setdefault(int(number), {})[key] = value
            self.optimizer.load_state_dict(whole)
            if self._scaler.is_enabled():
                self._scaler.load_state_dict(state["scaler"])
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise Unusable("the optimizer's state is of other weights") from error

    def _move(self) -> None:
        if self._training.clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
            nn.utils.clip_grad_norm_(weights, self._training.clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def _parts(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """Nearly equal parts of at most `micro_batch_size` samples, on the device, with their shares of the loss."""
        most = self._training.micro_batch_size or len(batch)
        count = max(1, min(math.ceil(len(batch) / most), len(batch) // self._smallest))
        if count == 1:
            yield batch.to(self._device), 1.0
            return
        parts = [batch.part(rows.tolist()) for rows in torch.arange(len(batch)).tensor_split(count)]
        terms = [self._task.terms(part) for part in parts]
        for part, own in zip(parts, terms, strict=True):
            if own:  # what nothing is said of has no gradient
                yield part.to(self._device), own / sum(terms)
