"""Sentence embeddings: vectors whose angles say how alike texts are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from app.contract.errors import Unsupported
from worker.data.batch import Batch
from worker.objectives.base import Forward, Plain, counted, required, run

BLOCK = 512  # rows whose similarities to all others are held at once


class SentenceEmbedding(Plain):
    """Vectors [batch, dimensions]. There is no loss of the task's own: a student follows its teacher's vectors."""

    evaluation_batch = 64
    supervised = False

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        raise Unsupported("A sentence-embedding model is trained by distillation: give `distill`.")

    def divergence(self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float) -> Tensor:
        """One minus the mean cosine of the angle between a student's and its teacher's vectors."""
        return 1 - functional.cosine_similarity(student, teacher, dim=-1).mean()

    def score(self, forward: Forward, batches: Iterable[Batch]) -> tuple[float, int]:
        """The share of samples whose nearest other sample, by the cosine, has the same class (leave-one-out 1-NN)."""
        outputs, targets = [], []
        for batch in batches:
            targets.append(required(batch).cpu())
            outputs.append(functional.normalize(run(forward, batch).float(), dim=-1))
        total = counted(sum(map(len, targets)))
        if total == 1:
            return 0.0, 1
        return _neighbours_agree(torch.cat(outputs), torch.cat(targets)), total


def _neighbours_agree(vectors: Tensor, classes: Tensor) -> float:
    """vectors [n, dimensions] of length 1, classes int64 [n]."""
    agree = 0
    for start in range(0, len(vectors), BLOCK):
        similarity = vectors[start : start + BLOCK] @ vectors.T
        rows = torch.arange(len(similarity))
        similarity[rows, rows + start] = -torch.inf  # not with itself
        agree += int((classes[similarity.argmax(1)] == classes[start : start + BLOCK]).sum())
    return agree / len(vectors)
