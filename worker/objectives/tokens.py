"""One class a word: named entities, parts of speech."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from worker.data.base import RawBatch
from worker.data.batch import IGNORED, Batch, Inputs
from worker.metrics.kinds import of_tags
from worker.metrics.tally import Tally
from worker.objectives.base import Forward, Plain, counting, required, run
from worker.training import losses

Words = Callable[[RawBatch], list[list[int | None]]]
"""The number of the word that each token of each sample belongs to; None for padding and special tokens."""


class TokenClassification(Plain):
    """Logits [batch, tokens, classes] against classes int64 [batch, tokens], IGNORED where a token does not count.

    A word is judged by its first token. Without `words` (arrays of ids) the targets come aligned.
    """

    metrics = of_tags
    evaluation_batch = 32

    def __init__(self, words: Words | None = None) -> None:
        self._words = words

    def targets(self, raw: RawBatch, inputs: Inputs) -> Tensor | None:
        if raw.targets is None or self._words is None or isinstance(raw.inputs, dict):
            return raw.targets if isinstance(raw.targets, Tensor) else _padded(raw.targets, inputs)
        rows = [_aligned(words, tags) for words, tags in zip(self._words(raw), raw.targets, strict=True)]
        return torch.tensor(rows, dtype=torch.int64)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return losses.cross_entropy(outputs, required(batch), batch.smoothing)

    def terms(self, batch: Batch) -> int:
        return counting(batch.targets)

    def divergence(self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float) -> Tensor:
        return losses.soft_targets(student, teacher, temperature, _counts(batch))

    def judge(self, tally: Tally, forward: Forward, batch: Batch) -> None:
        """Of the words."""
        targets, logits = required(batch).cpu(), run(forward, batch)
        counts = targets != IGNORED
        chosen, wanted = logits[counts].double(), targets[counts]
        said = chosen.argmax(-1)
        loss = functional.cross_entropy(chosen, wanted, reduction="none")
        values = {"accuracy": (said == wanted,), "macro_f1": (said, wanted), "log_loss": (loss,)}
        tally.update(len(batch), len(wanted), logits.shape[-1], values if len(wanted) else None)


def _aligned(words: list[int | None], tags: Tensor | str) -> list[int]:
    """The tag of each word at its first token, IGNORED elsewhere; words that were cut off have no token."""
    found: list[int] = []
    last: int | None = None
    for word in words:
        found.append(int(tags[word]) if word is not None and word != last else IGNORED)
        last = word
    return found


def _padded(tags: list[Tensor] | list[str] | None, inputs: Inputs) -> Tensor | None:
    """Tags of samples of unequal length as one tensor as wide as the inputs."""
    if tags is None:
        return None
    padded = torch.full((len(tags), inputs[0].shape[1]), IGNORED, dtype=torch.int64)
    for row, own in zip(padded, tags, strict=True):
        assert isinstance(own, Tensor)
        row[: len(own)] = own
    return padded


def _counts(batch: Batch) -> Tensor | None:
    """The positions that a teacher is followed at: those with a target, else those that are no padding."""
    if batch.targets is not None:
        return batch.targets != IGNORED
    return batch.inputs[1].bool() if len(batch.inputs) > 1 else None
