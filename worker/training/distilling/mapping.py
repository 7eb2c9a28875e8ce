"""Which layer of a student is held against which of its teacher: pure functions of what both networks gave.

In this order: stacks of equal blocks by depth, as in TinyBERT (Jiao et al. 2019); activation maps by their size, the
last one of each, as in FitNets and attention transfer (Romero et al. 2014, Zagoruyko & Komodakis 2016); else layers
with weights by depth, without the last one, whose output is the network's.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from app.contract.errors import InvalidSpec, Unsupported
from worker.training.distilling.recording import Point, Survey

Pair = tuple[Point, Point]
NAMES_SHOWN = 12


def hidden_pairs(student: Survey, teacher: Survey) -> list[Pair]:
    """Layers whose outputs can be compared. Raises Unsupported where there are none."""
    for pairs in (_blocks(student, teacher), _maps(student, teacher), _weighted(student, teacher)):
        fitting = [pair for pair in pairs if comparable(*pair)]
        if fitting:
            return fitting
    raise Unsupported("No layer of the student was found that compares with one of the teacher's: name them in layers.")


def map_pairs(student: Survey, teacher: Survey) -> tuple[list[Pair], bool]:
    """Layers for attention maps, and whether those are attention probabilities. Raises Unsupported where none are."""
    if student.attentions and teacher.attentions:
        return by_depth(student.attentions, teacher.attentions), True
    pairs = _maps(student, teacher)
    if not pairs:
        raise Unsupported(
            "attention_maps needs layers of transformers that give their attention probabilities, or activation maps "
            "[batch, channels, height, width] of one size in student and teacher; these networks have neither."
        )
    return pairs, False


def named_pairs(names: Sequence[tuple[str, str]], student: Survey, teacher: Survey) -> list[Pair]:
    """The layers that a client names. Raises InvalidSpec for a name that is no layer, or one that did not run."""
    return [(_named(ours, student, "student"), _named(theirs, teacher, "teacher")) for ours, theirs in names]


def named_attentions(names: Sequence[tuple[str, str]], student: Survey, teacher: Survey) -> list[Pair] | None:
    """The same among the layers that give attention probabilities; None where one of the names is none of them."""
    ours, theirs = ({point.name: point for point in one.attentions} for one in (student, teacher))
    pairs = [(ours.get(a), theirs.get(b)) for a, b in names]
    found = [(a, b) for a, b in pairs if a is not None and b is not None]
    return found if len(found) == len(pairs) else None


def by_depth(student: Sequence[Point], teacher: Sequence[Point]) -> list[Pair]:
    """Each of a student's n layers with the teacher's at the same share of its depth, the last with the last."""
    n, m = len(student), len(teacher)
    return [(point, teacher[max(round((i + 1) * m / n) - 1, 0)]) for i, point in enumerate(student)]


def comparable(student: Point, teacher: Point) -> bool:
    """Whether the outputs differ in one axis of features at most, besides the size of maps, which are pooled."""
    a, b = student.shape, teacher.shape
    if len(a) != len(b):
        return False
    return len(a) != 3 or a[1] == b[1] or a[2] == b[2]


def features(survey: Survey) -> Point:
    """The last layer with weights: what goes into it describes a sample. Raises Unsupported for a network of one."""
    found = [point for point in survey.points if point.weighted and point.fed]
    if len(found) < 2:
        raise Unsupported("The network has a single layer with weights, so no features of a sample before it.")
    return found[-1]


def _named(name: str, survey: Survey, whose: str) -> Point:
    found = next((point for point in survey.points if point.name == name), None)
    if found is not None:
        return found
    if name in survey.names:
        raise InvalidSpec(f"The {whose}'s layer {name!r} gives no tensor of floats to compare; name another one.")
    shown = ", ".join(point.name for point in survey.points[:NAMES_SHOWN])
    raise InvalidSpec(f"The {whose} has no layer {name!r}. Its layers are {shown}, …")


def _blocks(student: Survey, teacher: Survey) -> list[Pair]:
    """Stacks that both have under the same name, else the last stack of each."""
    ours, theirs = _stacks(student), _stacks(teacher)
    both = [parent for parent in ours if parent in theirs]
    if both:
        return [pair for parent in both for pair in by_depth(ours[parent], theirs[parent])]
    if not ours or not theirs:
        return []
    return by_depth(list(ours.values())[-1], list(theirs.values())[-1])


def _stacks(survey: Survey) -> dict[str, list[Point]]:
    """Layers [batch, tokens, features] of one class that have layers inside, by the layer that holds them.

    A student may have a single block left where its teacher has several.
    """
    found: dict[str, list[Point]] = {}
    for point in survey.points:
        numbered = point.name.rpartition(".")[2].isdigit()
        if numbered and not point.leaf and len(point.shape) == 3:
            found.setdefault(f"{point.parent}:{point.kind}", []).append(point)
    return found


def _maps(student: Survey, teacher: Survey) -> list[Pair]:
    """The last activation map of each size that both have, of more than one position."""
    ours, theirs = _last_of_size(student), _last_of_size(teacher)
    return [(point, theirs[size]) for size, point in ours.items() if size in theirs]


def _last_of_size(survey: Survey) -> dict[tuple[int, ...], Point]:
    found: dict[tuple[int, ...], Point] = {}
    for point in survey.points:
        size = point.shape[2:]
        if len(point.shape) >= 4 and prod(size) > 1:
            found.pop(size, None)  # in the order of the last ones
            found[size] = point
    return found


def _weighted(student: Survey, teacher: Survey) -> list[Pair]:
    ours, theirs = ([point for point in one.points if point.weighted][:-1] for one in (student, teacher))
    return by_depth(ours, theirs) if ours and theirs else []
