"""Losses on what layers give: scalars, 0 where student and teacher agree. Teachers' tensors carry no gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Keeps the root of a squared distance of 0 differentiable.
TINY = 1e-12
# Triples grow with the cube of a batch: of more samples than these, the first ones are related.
MAX_RELATED = 96


def hint(student: Tensor, teacher: Tensor, counts: Tensor | None = None) -> Tensor:
    """The mean squared error of states of one shape (Romero et al. 2014).

    `counts` bool [batch, tokens] says which of [batch, tokens, features] are compared.
    """
    error = functional.mse_loss(student, teacher, reduction="none")
    return error.mean() if counts is None else error[counts].mean()


def attention_map(activations: Tensor) -> Tensor:
    """[batch, channels, …] to a map [batch, 1, …] of length 1: the squares summed over the channels."""
    return unit(activations.square().sum(1, keepdim=True))


def unit(maps: Tensor) -> Tensor:
    """Maps [batch, 1, …], each scaled to length 1."""
    return functional.normalize(maps.flatten(1), dim=1).reshape(maps.shape)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared distance of two attention maps [batch, 1, …], a mean over the batch.

    Zagoruyko & Komodakis 2016 with squares, as their code has it: the root has no gradient where the maps agree.
    """
    return (student - teacher).square().flatten(1).sum(1).mean()


def attention_probabilities(student: Tensor, teacher: Tensor, counts: Tensor | None = None) -> Tensor:
    """The mean squared error of attention probabilities [batch, heads, queries, keys] (Jiao et al. 2019).

    Where the numbers of heads differ, the means over the heads are compared. `counts` bool [batch, queries].
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    error = functional.mse_loss(student, teacher, reduction="none").mean(1)
    return error.mean() if counts is None else error[counts].mean()


def distances(vectors: Tensor) -> Tensor:
    """Distances [n, n] between vectors [n, dimensions], over their mean without the diagonal."""
    n = len(vectors)
    squares = (vectors[:, None] - vectors[None]).square().sum(-1)
    found = (squares + TINY).sqrt() * (1 - torch.eye(n, device=vectors.device, dtype=vectors.dtype))
    return found / (found.sum() / max(n * (n - 1), 1)).clamp(min=TINY)


def distance_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-D (Park et al. 2019): the Huber loss of the distances, a mean over pairs of different samples."""
    n = len(student)
    error = functional.smooth_l1_loss(distances(student), distances(teacher), reduction="sum")
    return error / max(n * (n - 1), 1)


def angles(vectors: Tensor) -> Tensor:
    """Cosines [n, n, n] of the angles at the first of three vectors [n, dimensions]; 0 where two coincide."""
    sides = functional.normalize(vectors[None] - vectors[:, None], dim=-1)
    return sides @ sides.transpose(1, 2)


def angle_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-A (Park et al. 2019): the Huber loss of the angles, a mean over triples of three different samples."""
    n = len(student)
    here = torch.arange(n, device=student.device)
    first, second, third = here[:, None, None], here[None, :, None], here[None, None, :]
    different = (first != second) & (first != third) & (second != third)
    error = functional.smooth_l1_loss(angles(student), angles(teacher), reduction="none")
    return error[different].sum() / max(n * (n - 1) * (n - 2), 1)


def contrast(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """InfoNCE (van den Oord, Li & Vinyals 2018) of vectors [batch, dimensions], cosines over the temperature.

    The right answer for the student's vector of a sample is the teacher's of the same one; the others' are wrong.
    """
    similarity = functional.normalize(student, dim=-1) @ functional.normalize(teacher, dim=-1).T / temperature
    return functional.cross_entropy(similarity, torch.arange(len(student), device=student.device))
