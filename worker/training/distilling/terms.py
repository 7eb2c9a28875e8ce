"""The losses of a distillation as modules: what each takes from both networks, and what it makes of that."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from app.contract.distillation import (
    AttentionMaps,
    Contrastive,
    Decoupled,
    Distill,
    HiddenStates,
    Loss,
    Relational,
    SoftTargets,
)
from app.contract.distillation import Sequence as SequenceLoss
from app.contract.errors import Unsupported
from app.contract.facts import Task
from app.contract.tasks import TASKS
from worker.objectives.base import Task as TaskObject
from worker.training.distilling import feature_math, logit_math, mapping
from worker.training.distilling.imitation import imitator
from worker.training.distilling.mapping import Pair
from worker.training.distilling.recording import Point, Side, Survey, Tap
from worker.training.distilling.views import Lesson, Projection, channel_axis, counted, pooled, same_size


class Term(nn.Module):
    """One loss. `pairs` are the taps that it needs, the student's and the teacher's; `kind` names it in the report."""

    kind: str

    def __init__(self, pairs: Sequence[tuple[Tap, Tap]] = ()) -> None:
        super().__init__()
        self.pairs = tuple(pairs)

    def forward(self, lesson: Lesson) -> Tensor:
        raise NotImplementedError

    def taken(self, lesson: Lesson) -> list[tuple[Tensor, Tensor]]:
        """The tensors of both networks, a pair of layers each."""
        return [(lesson.student.taken[ours], lesson.teacher.taken[theirs]) for ours, theirs in self.pairs]


class SoftTargetsTerm(Term):
    """The task's own divergence of the outputs."""

    kind = "soft_targets"

    def __init__(self, task: TaskObject, temperature: float) -> None:
        super().__init__()
        self.task, self.temperature = task, temperature

    def forward(self, lesson: Lesson) -> Tensor:
        outputs = lesson.student.outputs, lesson.teacher.outputs
        return self.task.divergence(*outputs, lesson.batch, self.temperature)


class DecoupledTerm(Term):
    """Zhao et al. 2022. Without targets, the teacher's likeliest class stands for the target."""

    kind = "decoupled"

    def __init__(self, loss: Decoupled, temperature: float) -> None:
        super().__init__()
        self.loss, self.temperature = loss, temperature

    def forward(self, lesson: Lesson) -> Tensor:
        theirs, targets = lesson.teacher.outputs, lesson.batch.targets
        chosen = theirs.argmax(-1) if targets is None else targets
        return logit_math.decoupled(
            lesson.student.outputs, theirs, chosen, self.temperature, self.loss.target, self.loss.others
        )


class HiddenStatesTerm(Term):
    """Romero et al. 2014, a mean over the layers."""

    kind = "hidden_states"

    def __init__(self, loss: HiddenStates, pairs: Sequence[Pair]) -> None:
        super().__init__(_taps(pairs))
        self.projections = nn.ModuleList(_projection(loss, *pair) for pair in pairs)

    def forward(self, lesson: Lesson) -> Tensor:
        total = lesson.student.outputs.new_zeros(())
        for projection, (ours, theirs) in zip(self.projections, self.taken(lesson), strict=True):
            ours, theirs = same_size(projection(ours), theirs)
            counts = counted(lesson.mask, ours.shape[1]) if ours.ndim == 3 else None
            total = total + feature_math.hint(ours, theirs, counts)
        return total / len(self.pairs)


class AttentionMapsTerm(Term):
    """Zagoruyko & Komodakis 2016 on activation maps, Jiao et al. 2019 on probabilities; a mean over the layers."""

    kind = "attention_maps"

    def __init__(self, pairs: Sequence[Pair], probabilities: bool) -> None:
        super().__init__(_taps(pairs, "attention" if probabilities else "map"))
        self.probabilities = probabilities

    def forward(self, lesson: Lesson) -> Tensor:
        total = lesson.student.outputs.new_zeros(())
        for ours, theirs in self.taken(lesson):
            if self.probabilities:
                counts = counted(lesson.mask, ours.shape[2])
                total = total + feature_math.attention_probabilities(ours, theirs, counts)
            else:
                maps = (feature_math.unit(one) for one in same_size(ours, theirs))
                total = total + feature_math.attention_transfer(*maps)
        return total / len(self.pairs)


class VectorsTerm(Term):
    """What compares one vector a sample: those of named layers, the features before the last layer, or embeddings."""

    def vectors(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        if not self.pairs:
            return lesson.student.outputs, lesson.teacher.outputs
        ours, theirs = self.taken(lesson)[0]
        return pooled(ours, lesson.mask), pooled(theirs, lesson.mask)


class RelationalTerm(VectorsTerm):
    """Park et al. 2019."""

    kind = "relational"

    def __init__(self, loss: Relational, pairs: Sequence[tuple[Tap, Tap]]) -> None:
        super().__init__(pairs)
        self.loss = loss

    def forward(self, lesson: Lesson) -> Tensor:
        ours, theirs = (one[: feature_math.MAX_RELATED] for one in self.vectors(lesson))
        distance = self.loss.distance * feature_math.distance_relation(ours, theirs) if self.loss.distance else 0
        angle = self.loss.angle * feature_math.angle_relation(ours, theirs) if self.loss.angle else 0
        return ours.new_zeros(()) + distance + angle


class ContrastiveTerm(VectorsTerm):
    """InfoNCE, with a projection to the teacher's width where the widths differ."""

    kind = "contrastive"

    def __init__(self, loss: Contrastive, pairs: Sequence[tuple[Tap, Tap]], widths: tuple[int, int]) -> None:
        super().__init__(pairs)
        self.temperature = loss.temperature
        self.projection = nn.Identity() if widths[0] == widths[1] else Projection(*widths, axis=1)

    def forward(self, lesson: Lesson) -> Tensor:
        ours, theirs = self.vectors(lesson)
        return feature_math.contrast(self.projection(ours), theirs, self.temperature)


class SequenceTerm(Term):
    """Kim & Rush 2016: the task's loss on what the teacher says."""

    kind = "sequence"

    def __init__(self, loss: SequenceLoss, task: TaskObject) -> None:
        super().__init__()
        self.task = task
        self.imitate = imitator(task, loss)

    def forward(self, lesson: Lesson) -> Tensor:
        said = self.imitate(lesson.ask_teacher, lesson.batch)
        return self.task.loss(lesson.ask_student(said.inputs), said)


def build_terms(
    distill: Distill, name: Task, task: TaskObject, student: Survey, teacher: Survey, widths: tuple[int, int]
) -> list[Term]:
    """The terms of a distillation; `widths` are the sizes of the last dimension of student's and teacher's outputs.

    Raises Unsupported for a loss that the task or the networks have nothing for, InvalidSpec for unknown layers.
    """
    return [_term(loss, distill, name, task, student, teacher, widths) for loss in distill.losses]


def _term(
    loss: Loss,
    distill: Distill,
    name: Task,
    task: TaskObject,
    student: Survey,
    teacher: Survey,
    widths: tuple[int, int],
) -> Term:
    match loss:
        case SoftTargets():
            _same_outputs(loss.kind, widths)
            return SoftTargetsTerm(task, distill.temperature)
        case Decoupled():
            _same_outputs(loss.kind, widths)
            _needs_classes(name)
            return DecoupledTerm(loss, distill.temperature)
        case HiddenStates():
            pairs = _pairs(loss, student, teacher)
            return HiddenStatesTerm(loss, pairs)
        case AttentionMaps():
            return _attention_maps(loss, student, teacher)
        case Relational() | Contrastive():
            return _vectors(loss, name, student, teacher, widths)
        case SequenceLoss():
            return SequenceTerm(loss, task)


def _same_outputs(kind: str, widths: tuple[int, int]) -> None:
    if widths[0] != widths[1]:
        raise Unsupported(
            f"{kind} compares outputs, and the student gives {widths[0]} values where the teacher gives {widths[1]}. "
            "Use hidden_states, relational or contrastive."
        )


def _needs_classes(name: Task) -> None:
    if TASKS[name].targets not in ("classes", "tags") or TASKS[name].needs_teacher:
        raise Unsupported(f"decoupled needs one right class among several; a {name} model has none. Use soft_targets.")


def _pairs(loss: HiddenStates, student: Survey, teacher: Survey) -> list[Pair]:
    if loss.layers is None:
        return mapping.hidden_pairs(student, teacher)
    pairs = mapping.named_pairs(loss.layers, student, teacher)
    for ours, theirs in pairs:
        if not mapping.comparable(ours, theirs):
            raise Unsupported(
                f"{ours.name!r} of the student gives {list(ours.shape)} and {theirs.name!r} of the teacher "
                f"{list(theirs.shape)} for a batch of {ours.shape[0]}: they differ in more than their features."
            )
    return pairs


def _attention_maps(loss: AttentionMaps, student: Survey, teacher: Survey) -> Term:
    if loss.layers is None:
        return AttentionMapsTerm(*mapping.map_pairs(student, teacher))
    attentions = mapping.named_attentions(loss.layers, student, teacher)
    if attentions is not None:
        return AttentionMapsTerm(attentions, True)
    pairs = mapping.named_pairs(loss.layers, student, teacher)
    for point in (one for pair in pairs for one in pair):
        if len(point.shape) < 4:
            raise Unsupported(f"{point.name!r} gives {list(point.shape)}, which is no map of attention.")
    return AttentionMapsTerm(pairs, False)


def _vectors(
    loss: Relational | Contrastive, name: Task, student: Survey, teacher: Survey, widths: tuple[int, int]
) -> Term:
    """Of named layers; of an embedding its outputs; else what goes into the last layer."""
    if loss.layers is not None:
        pairs = mapping.named_pairs(loss.layers, student, teacher)
        taps = _taps(pairs)
        widths = (_features(pairs[0][0].shape), _features(pairs[0][1].shape))
    elif TASKS[name].output == "embedding":
        taps = []
    else:
        ours, theirs = mapping.features(student), mapping.features(teacher)
        taps = [(Tap(ours.name, "input"), Tap(theirs.name, "input"))]
        widths = (_features(ours.fed), _features(theirs.fed))
    if isinstance(loss, Relational):
        return RelationalTerm(loss, taps)
    return ContrastiveTerm(loss, taps, widths)


def _features(shape: Sequence[int]) -> int:
    """The length of what `pooled` makes of a tensor of this shape."""
    return shape[1] if len(shape) > 3 else shape[-1]


def _projection(loss: HiddenStates, student_point: Point, teacher_point: Point) -> nn.Module:
    axis = channel_axis(student_point, teacher_point)
    ours, theirs = student_point.shape[axis], teacher_point.shape[axis]
    if ours == theirs and loss.projection == "auto":
        return nn.Identity()
    return Projection(ours, theirs, axis)


def _taps(pairs: Sequence[Pair], side: Side = "output") -> list[tuple[Tap, Tap]]:
    return [(Tap(ours.name, side), Tap(theirs.name, side)) for ours, theirs in pairs]
