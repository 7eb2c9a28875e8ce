"""The teacher of a training: one network or several, in eval mode, and what they say together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from app.contract.distillation import Distill
from app.contract.facts import Task
from worker.context import Context
from worker.data.batch import Inputs
from worker.training.distilling import logit_math
from worker.training.distilling.recording import Survey, Tap, recording, survey
from worker.training.distilling.views import Answer


class Teacher:
    """Answers batches without learning from them. `taps` are taken from the first network."""

    def __init__(self, modules: Sequence[nn.Module], task: Task, temperature: float) -> None:
        self._modules = [module.eval() for module in modules]
        self._together = _together(task, temperature)
        self.taps: tuple[Tap, ...] = ()

    def __call__(self, inputs: Inputs) -> Answer:
        """The answer to inputs on the teachers' device. Not inference_mode: autograd keeps it for the student."""
        with torch.no_grad(), recording(self._modules[0], self.taps) as taken:
            first = self._modules[0](*inputs)
            others = [module(*inputs) for module in self._modules[1:]]
        return Answer(self._together([first, *others]) if others else first, taken)

    def ask(self, inputs: Inputs) -> Tensor:
        """The outputs alone."""
        device = next(self._modules[0].parameters()).device
        with torch.no_grad():
            said = [module(*(tensor.to(device) for tensor in inputs)) for module in self._modules]
        return self._together(said) if len(said) > 1 else said[0]

    def survey(self, example: Inputs) -> Survey:
        """The layers that can be looked into."""
        return survey(self._modules[0], example)


def teacher_of(context: Context, distill: Distill) -> Teacher:
    """The teacher that a job names, on the job's device."""
    modules = [context.teacher if name == "uploaded" else context.named[name].module for name in distill.teachers]
    for module in modules:
        module.to(context.device)
    return Teacher(modules, context.model.facts.task, distill.temperature)


def _together(task: Task, temperature: float) -> Callable[[Sequence[Tensor]], Tensor]:
    """How several answers become one: as probabilities where the task has them (Hinton, Vinyals & Dean 2015)."""
    if task == "regression":
        return lambda outputs: torch.stack(list(outputs)).mean(0)
    if task == "sentence-embedding":
        return logit_math.mean_direction
    if task == "multi-label":
        return lambda outputs: logit_math.mean_sigmoid(outputs, temperature)
    return lambda outputs: logit_math.mean_softmax(outputs, temperature)
