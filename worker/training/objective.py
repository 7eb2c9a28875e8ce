"""What a step of training lowers: the loss of one batch, with what a teacher says in it where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from app.contract.distillation import Distill
from app.contract.errors import InvalidSpec
from worker.context import Context
from worker.data.batch import Batch, Inputs
from worker.objectives.base import Task
from worker.techniques.base import Details
from worker.training.distillation import combined
from worker.training.distilling.cache import AnswerCache, answers_kept
from worker.training.distilling.recording import recording, survey
from worker.training.distilling.teachers import Teacher, teacher_of
from worker.training.distilling.terms import Term, build_terms
from worker.training.distilling.views import Answer, Lesson
from worker.training.states import State, load_module, module_state


class Objective:
    """Takes a batch on the model's device, in training mode, and gives the scalar to lower.

    `modules` is what the loss itself learns beside the student (projections of hints); it has no part in what is
    delivered, but an optimizer has to train it, and a checkpoint to keep it.
    """

    def __init__(self, student: nn.Module, task: Task) -> None:
        self.student = student
        self.task = task
        self.modules = nn.ModuleList()

    def __call__(self, batch: Batch) -> Tensor:
        return self.task.loss(self._ask(batch.inputs), batch)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is learned along with the student."""
        return self.modules.parameters()

    def undecayed(self) -> Iterator[nn.Parameter]:
        """Those of them that weight decay has to leave alone: where zero is a value like any other."""
        return iter(())

    @property
    def learns(self) -> bool:
        """Whether the loss has anything to learn itself."""
        return any(True for _ in self.parameters())

    def state(self) -> State:
        """What it has learned so far."""
        return module_state(self.modules)

    def load(self, state: State) -> None:
        """Goes on from there. Raises Unusable for the state of other losses."""
        load_module(self.modules, state)

    def details(self) -> Details:
        """For the report of a step."""
        return {}

    def _ask(self, inputs: Inputs) -> Tensor:
        try:
            outputs: Tensor = self.student(*inputs)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InvalidSpec(
                "BatchNorm cannot be trained on one sample at a time: use a batch_size of 2 or more, "
                "and a `train` split of as many samples."
            ) from error
        return outputs


class Penalized(Objective):
    """Another objective and, beside it, what a penalty gives of the network as it stands, whatever the batch is."""

    def __init__(self, inner: Objective, penalty: nn.Module) -> None:
        super().__init__(inner.student, inner.task)
        self._inner, self._penalty = inner, penalty
        self.modules.extend([inner.modules, penalty])

    def __call__(self, batch: Batch) -> Tensor:
        penalty: Tensor = self._penalty()
        return self._inner(batch) + penalty

    def undecayed(self) -> Iterator[nn.Parameter]:
        return self._penalty.parameters()

    def details(self) -> Details:
        return self._inner.details()


class Distilled(Objective):
    """The objective of a student that has a teacher."""

    def __init__(
        self,
        student: nn.Module,
        task: Task,
        teacher: Teacher,
        terms: list[Term],
        distill: Distill,
        mask_input: int | None,
    ) -> None:
        super().__init__(student, task)
        self.teacher = teacher
        self.terms = terms
        self.modules.extend(terms)
        self.cache: AnswerCache | None = None
        self.cache_reason: str | None = None
        self._distill = distill
        self._mask_input = mask_input
        self._taps = tuple(ours for term in terms for ours, _ in term.pairs)
        teacher.taps = tuple(dict.fromkeys(theirs for term in terms for _, theirs in term.pairs))

    def __call__(self, batch: Batch) -> Tensor:
        theirs = self.teacher(batch.inputs) if self.cache is None else self.cache.answer(batch)
        with recording(self.student, self._taps) as taken:
            outputs = self._ask(batch.inputs)
        mask = None if self._mask_input is None else batch.inputs[self._mask_input].bool()
        lesson = Lesson(batch, Answer(outputs, dict(taken)), theirs, mask, self._ask, self.teacher.ask)
        said = [_times(term(lesson), loss.weight) for term, loss in zip(self.terms, self._distill.losses, strict=True)]
        together = said[0] if len(said) == 1 else torch.stack(said).sum()
        return combined(self.task, outputs, together, batch, self._distill.alpha)

    def details(self) -> Details:
        found: Details = {"distill_losses": ", ".join(loss.kind for loss in self._distill.losses)}
        pairs = [(term.kind, ours, theirs) for term in self.terms for ours, theirs in term.pairs]
        if pairs:
            found["distill_layers"] = [
                {"loss": kind, "student": ours.layer, "teacher": theirs.layer, "side": ours.side}
                for kind, ours, theirs in pairs
            ]
        if self.cache is None:
            found["teacher_answers"] = f"computed at every step: {self.cache_reason}"
        else:
            found |= self.cache.details()
        return found


def _times(loss: Tensor, weight: float) -> Tensor:
    return loss if weight == 1 else weight * loss


def objective(context: Context, task: Task, distill: Distill | None, *, samples: int, fixed: bool = True) -> Objective:
    """The objective of `context.model`.

    `samples` is how many samples the training will see in all, repeated ones each time; `fixed` says that a sample is
    the same each time. Both decide whether the teacher's answers are computed once, before the first step, and kept.
    Raises Unsupported and InvalidSpec for losses and layers that the networks have nothing for.
    """
    student = context.model.module
    if distill is None:
        return Objective(student, task)
    teacher = teacher_of(context, distill)
    example = tuple(tensor.to(context.device) for tensor in context.model.example(2))
    surveys = survey(student.to(context.device), example), teacher.survey(example)
    widths = _width(student, example), teacher.ask(example).shape[-1]
    terms = build_terms(distill, context.model.facts.task, task, *surveys, widths)
    names = [tensor.name for tensor in context.model.facts.inputs]
    mask_input = names.index("attention_mask") if "attention_mask" in names else None
    made = Distilled(student, task, teacher, terms, distill, mask_input)
    made.modules.to(context.device)
    kept = answers_kept(context, task, teacher, distill.cache, mask_input, samples=samples, fixed=fixed)
    if isinstance(kept, AnswerCache):
        made.cache = kept
    else:
        made.cache_reason = kept
    return made


def _width(student: nn.Module, example: Inputs) -> int:
    """The size of the last dimension of the outputs."""
    training = student.training
    with torch.no_grad():
        width = student.eval()(*example).shape[-1]
    student.train(training)
    return int(width)
