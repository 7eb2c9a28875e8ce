"""One step of a training: the gradient of a batch, in parts where it is to be, and the optimizer's move."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from app.contract.training import Settled
from worker.data.batch import Batch, Share
from worker.objectives.base import Plain, Task
from worker.ranks.ranks import Ranks
from worker.ranks.sharded import alike
from worker.training import optimizers, precision
from worker.training.divergence import Diverged
from worker.training.sharing import Lesson
from worker.training.states import State, Unusable


class Stepper:
    """Takes steps. `norm` of the gradients is clipped, parts of a batch are added up, passes are cast."""

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        lesson: Lesson,
        training: Settled,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks, self._lesson = ranks or Ranks(), lesson
        self._share = Share(self._ranks.rank, self._ranks.size)
        learned = lesson.objective
        self.optimizer = optimizers.build(module, training, learned.parameters(), learned.undecayed())
        self._task, self._training, self._device = task, training, device
        self._dtype = precision.dtype_of(training.precision, device)
        self._scaler = precision.scaler(self._dtype, device)
        # The batch's own dimension shrinks, and BatchNorm takes no batch of one.
        self._smallest = 2 if any(isinstance(layer, _BatchNorm) for layer in module.modules()) else 1

    def step(self, batch: Batch, lr: float) -> float:
        """Moves the weights; the loss of the batch. Raises Diverged, before the move, where it is not finite.

        Cut into parts, the gradient is that of the whole batch but for rounding, since each part counts by its share
        of what the task's loss is a mean over: samples, or targets that count. It is not where samples of a batch have
        to do with each other (BatchNorm, losses that compare samples), and dropout draws other numbers. So it is with
        the shares of several processes: each gives its own, and all get the loss of the whole batch.
        """
        self.optimizer.zero_grad()
        self._lesson.begin()
        optimizers.set_rate(self.optimizer, lr)
        value = 0.0
        for part, share, last in self._parts(batch):
            with nullcontext() if last else self._lesson.unsummed():
                with precision.autocast(self._dtype, self._device):
                    loss = self._lesson(part, share)
                self._scaler.scale(loss).backward()
            value += loss.item()
        value = self._lesson.whole(value, self._scaler.get_scale())
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
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        try:
            for name, value in state.items():
                if name != "scaler":
                    number, key = name.split(".", 1)
                    if isinstance(value, Tensor):
                        value = alike(value, weights[int(number)])
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

    def _parts(self, batch: Batch) -> Iterator[tuple[Batch, float, bool]]:
        """Nearly equal parts of at most `micro_batch_size` samples, on the device, with their shares of the loss.

        As many in every process; the last one is marked.
        """
        alone = self._ranks.size == 1
        samples = len(batch) if alone else self._share.most(batch.whole or len(batch))
        most = self._training.micro_batch_size or samples
        count = max(1, min(math.ceil(samples / most), samples // self._smallest))
        if count == 1 and alone:
            yield batch.to(self._device), 1.0, True
            return
        rows = [own.tolist() for own in torch.arange(len(batch)).tensor_split(count)]
        parts = [replace(batch.part(own or [0]), stand_in=batch.stand_in or not own) for own in rows]
        terms = [0 if part.stand_in else self._task.terms(part) for part in parts]
        total = self._terms_of_all(batch, sum(terms))
        chosen = [(part, own / total if own else 0.0) for part, own in zip(parts, terms, strict=True)]
        if alone:
            chosen = [(part, share) for part, share in chosen if share]  # what nothing is said of has no gradient
        for number, (part, share) in enumerate(chosen, 1):
            yield part.to(self._device), share, number == len(chosen)

    def _terms_of_all(self, batch: Batch, own: int) -> float:
        """The terms of the whole batch, asked of the other processes where its number of samples does not say it."""
        if self._ranks.size == 1:
            return own
        if batch.whole is not None and getattr(type(self._task), "terms", None) is Plain.terms:
            return batch.whole
        return self._ranks.total(torch.tensor(float(own), dtype=torch.float64)).item()
