"""Teachers' outputs: what several of them say together, and decoupled knowledge distillation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from worker.data.batch import IGNORED


def decoupled(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, target_weight: float, others_weight: float
) -> Tensor:
    """T^2 * (a * TCKD + b * NCKD) of logits [..., classes] at targets int64 [...] (Zhao et al. 2022).

    TCKD is the divergence of the two-way distributions (target, not target), NCKD that of the distributions over the
    other classes alone; both softened by the temperature T, both means over the positions that count.
    """
    counts = targets.flatten() != IGNORED
    chosen = targets.flatten()[counts][:, None]
    ours, theirs = (_parts(logits.flatten(0, -2)[counts] / temperature, chosen) for logits in (student, teacher))
    target, others = (_divergence(theirs[i], ours[i]).sum(-1).mean() for i in (0, 1))
    return temperature**2 * (target_weight * target + others_weight * others)


def _parts(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n, 2] of the target and of all others, and [n, classes] among the others; -inf at targets."""
    others = logits.scatter(1, targets, -torch.inf)
    two = torch.cat((logits.gather(1, targets), others.logsumexp(1, keepdim=True)), dim=1)
    return functional.log_softmax(two, dim=1), functional.log_softmax(others, dim=1)


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """p * (log p - log q), 0 where p is 0."""
    excluded = teacher == -torch.inf
    difference = teacher.masked_fill(excluded, 0) - student.masked_fill(excluded, 0)
    return teacher.exp() * difference


def mean_softmax(logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Logits [..., classes] whose softmax at the temperature is the mean of those of all given (Hinton et al. 2015)."""
    soft = torch.stack([functional.log_softmax(one / temperature, dim=-1) for one in logits])
    return temperature * (soft.logsumexp(0) - torch.tensor(float(len(logits))).log())


def mean_sigmoid(logits: Sequence[Tensor], temperature: float) -> Tensor:
    """Logits whose sigmoid at the temperature is the mean of those of all given; the sides' sums keep small ones."""
    scaled = torch.stack([one / temperature for one in logits])
    yes, no = functional.logsigmoid(scaled).logsumexp(0), functional.logsigmoid(-scaled).logsumexp(0)
    return temperature * (yes - no)


def mean_direction(vectors: Sequence[Tensor]) -> Tensor:
    """The mean of vectors [..., dimensions] that are scaled to length 1."""
    return torch.stack([functional.normalize(one, dim=-1) for one in vectors]).mean(0)
