"""Sentence embeddings: vectors whose angles say how alike texts are."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from app.contract.errors import Unsupported
from worker.data.batch import Batch
from worker.metrics.kinds import of_vectors
from worker.metrics.tally import Tally
from worker.objectives.base import Forward, Plain, required, run


class SentenceEmbedding(Plain):
    """Vectors [batch, dimensions]. There is no loss of the task's own: a student follows its teacher's vectors."""

    metrics = of_vectors
    evaluation_batch = 64
    supervised = False

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        raise Unsupported("A sentence-embedding model is trained by distillation: give `distill`.")

    def divergence(self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float) -> Tensor:
        """One minus the mean cosine of the angle between a student's and its teacher's vectors."""
        return 1 - functional.cosine_similarity(student, teacher, dim=-1).mean()

    def judge(self, tally: Tally, forward: Forward, batch: Batch) -> None:
        targets, vectors = required(batch).cpu(), run(forward, batch)
        tally.update(len(batch), len(batch), 0, {"nearest_neighbour_accuracy": (vectors, targets)})
