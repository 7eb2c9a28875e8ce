"""What the losses of distillation look at, and how two layers of different form are brought into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from worker.data.batch import Batch, Inputs
from worker.training.distilling.recording import Point, Tap


@dataclass(frozen=True)
class Answer:
    """What a network said to a batch: its outputs, and what was taken from its layers."""

    outputs: Tensor
    taken: Mapping[Tap, Tensor]


@dataclass(frozen=True)
class Lesson:
    """One batch as both have answered it. `ask_student` and `ask_teacher` run them on other inputs.

    `mask` bool [batch, tokens] is false at padding; None where there is none.
    """

    batch: Batch
    student: Answer
    teacher: Answer
    mask: Tensor | None
    ask_student: Callable[[Inputs], Tensor]
    ask_teacher: Callable[[Inputs], Tensor]


def counted(mask: Tensor | None, tokens: int) -> Tensor | None:
    """The mask, where it is about these tokens."""
    return mask if mask is not None and mask.shape[1] == tokens else None


def channel_axis(student: Point, teacher: Point) -> int:
    """Where the features of two comparable layers lie: behind the batch in maps, last in rows and sequences.

    Of a sequence [batch, …, …], the axis in which they differ: [batch, channels, steps] is one as well.
    """
    if len(student.shape) >= 4:
        return 1
    if len(student.shape) == 3 and student.shape[2] == teacher.shape[2] and student.shape[1] != teacher.shape[1]:
        return 1
    return len(student.shape) - 1


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [batch, channels, …] pooled to the smaller of their sizes; other tensors as they are."""
    if student.ndim < 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size: Any = tuple(min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
    pool = functional.adaptive_avg_pool2d if student.ndim == 4 else functional.adaptive_avg_pool3d
    return pool(student, size), pool(teacher, size)


def pooled(states: Tensor, mask: Tensor | None) -> Tensor:
    """One vector a sample, [batch, features]: the mean over tokens that are no padding, or over positions."""
    if states.ndim == 3:
        counts = counted(mask, states.shape[1])
        if counts is None:
            return states.mean(1)
        weights = counts[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    return states.flatten(2).mean(2) if states.ndim > 3 else states


class Projection(nn.Module):
    """A learned linear map of the features along one axis: a 1x1 convolution on maps, a matrix on sequences."""

    def __init__(self, student: int, teacher: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.linear = nn.Linear(student, teacher, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        projected: Tensor = self.linear(states.movedim(self.axis, -1))
        return projected.movedim(-1, self.axis)
