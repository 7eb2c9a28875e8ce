"""The student of a `distill` step: a new Model of the kind of the one it learns for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from app.contract.distillation import ArchitectureStudent, AutoStudent, ModelStudent, Student
from app.contract.errors import ModelRejected, Unsupported
from worker.constraints import baked
from worker.context import Context
from worker.loading.architecture import ArchitecturePlan
from worker.model import Model
from worker.students import declared
from worker.students.budget import Original, largest
from worker.students.configs import has_layers, shrunk
from worker.students.inherited import inherited
from worker.techniques.base import Details
from worker.vetting.boundary import refusing


@dataclass(frozen=True)
class Made:
    """A student, and what the report says of how it was made."""

    model: Model
    details: Details


def student_of(context: Context, student: Student, threads: int) -> Made:
    """The student that a step asks for.

    Raises Unsupported where none can be made of the model, and ModelRejected, with its pointer, for a description
    that does not work.
    """
    match student:
        case ModelStudent():
            return Made(context.named[student.model], {"student": f"the uploaded model {student.model}"})
        case ArchitectureStudent():
            made = _described(context, student)
            _check_fit(context.model, made)
            return Made(made, {"student": "a described network with random weights", **_spec(made)})
        case AutoStudent():
            return _smaller(context, student, threads)


def _described(context: Context, student: ArchitectureStudent) -> Model:
    """A network of a client's own; its random weights come from the job's seed."""
    # Which of the two a model has was checked when the job was; a plan of transformers is only imported with it.
    plan: Any = context.model.plan
    with refusing(ModelRejected, "student", "a model"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        if student.architecture is not None:
            return plan.model(student.architecture, plan.begin(student.architecture).state_dict())
        assert student.config is not None
        config = completed(student.config, plan.folder.config)
        return plan.model(config, plan.begin(config))


def completed(config: dict[str, Any], uploaded: dict[str, Any]) -> dict[str, Any]:
    """A client's config: of the same model_type it only has to say what changes; labels are the uploaded model's."""
    same = config.get("model_type", uploaded.get("model_type")) == uploaded.get("model_type")
    labels = {key: value for key, value in uploaded.items() if key in ("id2label", "label2id", "problem_type")}
    return {**(uploaded if same else {}), **config, **labels}


def _check_fit(teacher: Model, student: Model) -> None:
    """Raises Unsupported for a student that is larger, or that answers something else."""
    if student.facts.parameters > teacher.facts.parameters:
        raise Unsupported(
            f"The student has {student.facts.parameters:,} parameters, its teacher {teacher.facts.parameters:,}: "
            "a student is no larger than its teacher."
        )
    if student.facts.classes != teacher.facts.classes or student.facts.task != teacher.facts.task:
        raise Unsupported(
            f"The student gives {student.facts.classes} outputs for {student.facts.task}, its teacher "
            f"{teacher.facts.classes} for {teacher.facts.task}."
        )


def _smaller(context: Context, student: AutoStudent, threads: int) -> Made:
    """The largest copy within the budget. What is not vetted by a client's doing fails as our inability."""
    original = baked(context.model.module).cpu()
    measured = Original(original, _parameters(original), context.model.example(1), threads)
    try:
        maker = _maker(context.model, original, student)
        # By one process: latencies are never measured the same twice.
        share, cost = context.ranks.told(lambda: largest(student, measured, maker))
        candidate = maker(share)
        made = candidate.model()
    except ModelRejected as failure:
        raise Unsupported(f"No smaller copy of the model could be built. {failure.detail}") from failure
    budget = next(name for name in ("parameters", "macs", "latency") if getattr(student, name) is not None)
    details: Details = {
        "student": f"a smaller copy of the model, started from its weights ({candidate.how})",
        "student_share": share,
        f"student_{budget}_share": cost,
    }
    details |= _spec(made)
    if candidate.kept:
        details["student_layers"] = [{"student": now, "was": before} for now, before in candidate.kept.items()]
    return Made(made, details)


def _spec(student: Model) -> Details:
    """What the student's native file is uploaded with, as JSON; a folder says it itself."""
    return {} if student.spec is None else {"student_spec": json.dumps(student.spec)}


class _Declared:
    """A smaller copy of a declarative architecture."""

    def __init__(self, plan: ArchitecturePlan, copy: declared.Copy, how: str) -> None:
        self._plan, self._copy, self.how, self.kept = plan, copy, how, copy.kept

    def model(self) -> Model:
        return self._plan.model(self._copy.architecture, self._copy.state)

    def network(self) -> nn.Module:
        return self.model().module

    def parameters(self) -> int:
        return _parameters(self.network())


class _Configured:
    """A smaller copy of a model of transformers."""

    def __init__(self, plan: Any, original: nn.Module, width: float, depth: float, how: str) -> None:
        self._plan, self._original, self.how = plan, original, how
        self._shrunk = shrunk(plan.folder.config, original.config, width, depth)
        self.kept: dict[str, str] = {}

    def parameters(self) -> int:
        return _parameters(self._plan.begin(self._shrunk.config, "meta"))

    def network(self) -> nn.Module:
        return self._plan.model(self._shrunk.config, self._plan.begin(self._shrunk.config)).module

    def model(self) -> Model:
        module = self._plan.begin(self._shrunk.config)
        state, self.kept = inherited(module.state_dict(), self._original.state_dict(), self._shrunk)
        module.load_state_dict(state)
        return self._plan.model(self._shrunk.config, module)


def _maker(model: Model, original: nn.Module, student: AutoStudent) -> Callable[[float], _Declared | _Configured]:
    """How a candidate of a share is made."""
    plan = model.plan
    assert plan is not None  # asked when the job was checked
    if isinstance(plan, ArchitecturePlan):
        return _declared_maker(plan, model, original, student.shrink)
    deep = has_layers(original.config)
    width, depth = _exponents(student.shrink, deep)
    how = _how(width, depth)
    return lambda share: _Configured(plan, original, share if width else 1.0, share if depth else 1.0, how)


def _declared_maker(
    plan: ArchitecturePlan, model: Model, original: nn.Module, shrink: str
) -> Callable[[float], _Declared]:
    state = original.state_dict()
    deep = bool(declared.shallower(plan.layers, state, 1.0).kept)
    width, depth = _exponents(shrink, deep)

    def candidate(share: float) -> _Declared:
        copy = declared.shallower(plan.layers, state, share if depth else 1.0)
        if width:
            module = plan.begin(copy.architecture).eval()
            copy = declared.narrower(copy, module, model.example(1), share)
        return _Declared(plan, copy, _how(width, depth))

    return candidate


def _exponents(shrink: str, deep: bool) -> tuple[bool, bool]:
    """Whether width and depth are shrunk. Raises Unsupported for depth where there are no layers to leave out."""
    if shrink == "depth" and not deep:
        raise Unsupported("The model has no row of equal layers to leave some out of. Give shrink: width.")
    return shrink != "depth", deep and shrink != "width"


def _how(width: bool, depth: bool) -> str:
    return " and ".join(word for word, given in (("narrower", width), ("shallower", depth)) if given)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
