"""Language models: the next token, or the hidden ones. The text is its own target."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from worker.data.base import RawBatch
from worker.data.batch import IGNORED, Batch, Inputs
from worker.objectives.base import Forward, Plain, counted, counting, required, run
from worker.training import losses

# BERT's (Devlin, Chang, Lee & Toutanova 2018): of the chosen tokens 80 % are hidden, 10 % replaced, 10 % kept.
CHOSEN_SHARE = 0.15
HIDDEN_SHARE = 0.8
REPLACED_SHARE = 0.1
MASK_SEED = 0  # of an evaluation: every artifact is asked for the same hidden tokens


class CausalLm(Plain):
    """Logits [batch, tokens, vocabulary]; position i is judged by token i + 1."""

    evaluation_batch = 4

    def targets(self, raw: RawBatch, inputs: Inputs) -> Tensor | None:
        """The ids themselves; padding does not count."""
        return _visible(inputs)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return losses.cross_entropy(outputs[:, :-1], required(batch)[:, 1:], batch.smoothing)

    def terms(self, batch: Batch) -> int:
        return counting(required(batch)[:, 1:])

    def divergence(self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float) -> Tensor:
        counts = required(batch)[:, 1:] != IGNORED
        return losses.soft_targets(student[:, :-1], teacher[:, :-1], temperature, counts)

    def score(self, forward: Forward, batches: Iterable[Batch]) -> tuple[float, int]:
        """Perplexity a token: exp of the mean negative log-likelihood of every token after the first of its text."""
        return _perplexity((run(forward, batch)[:, :-1], required(batch)[:, 1:]) for batch in batches)


class MaskedLm(Plain):
    """Logits [batch, tokens, vocabulary]; judged at the tokens that were hidden."""

    evaluation_batch = 8

    def __init__(self, mask: int, special: Iterable[int], vocabulary: int) -> None:
        self._mask = mask
        self._special = torch.tensor(sorted({mask, *special}))
        self._vocabulary = vocabulary

    def targets(self, raw: RawBatch, inputs: Inputs) -> Tensor | None:
        """The ids themselves; `prepare` chooses which of them count."""
        return _visible(inputs)

    def prepare(self, batch: Batch, random: torch.Generator) -> Batch:
        """Hides a share of the tokens that are neither padding nor special; the others no longer count."""
        ids, targets = batch.inputs[0], required(batch)
        eligible = (targets != IGNORED) & ~torch.isin(targets, self._special)
        chosen = eligible & (torch.rand(ids.shape, generator=random) < CHOSEN_SHARE)
        fate = torch.rand(ids.shape, generator=random)
        noise = torch.randint(self._vocabulary, ids.shape, generator=random)
        shown = torch.where(chosen & (fate < HIDDEN_SHARE), self._mask, ids)
        replaced = chosen & (fate >= HIDDEN_SHARE) & (fate < HIDDEN_SHARE + REPLACED_SHARE)
        shown = torch.where(replaced, noise, shown)
        targets = torch.where(chosen, targets, IGNORED)
        return replace(batch, inputs=(shown, *batch.inputs[1:]), targets=targets, indices=None)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Zero, with a gradient of zero, for the rare batch in which no token was chosen."""
        targets = required(batch)
        if not bool((targets != IGNORED).any()):
            return outputs.sum() * 0
        return losses.cross_entropy(outputs, targets, batch.smoothing)

    def terms(self, batch: Batch) -> int:
        return counting(batch.targets)

    def divergence(self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float) -> Tensor:
        """At every token that is no padding: the teacher has an opinion on the visible ones too."""
        counts = batch.inputs[1].bool() if len(batch.inputs) > 1 else None
        return losses.soft_targets(student, teacher, temperature, counts)

    def score(self, forward: Forward, batches: Iterable[Batch]) -> tuple[float, int]:
        """Pseudo-perplexity: exp of the mean negative log-likelihood of the hidden tokens, which a fixed seed chose."""
        random = torch.Generator().manual_seed(MASK_SEED)
        prepared = (self.prepare(batch, random) for batch in batches)
        return _perplexity((run(forward, batch), required(batch)) for batch in prepared)


def _visible(inputs: Inputs) -> Tensor:
    """The ids where the attention mask, if there is one, is 1; IGNORED elsewhere."""
    ids = inputs[0]
    return torch.where(inputs[1].bool(), ids, IGNORED) if len(inputs) > 1 else ids


def _perplexity(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """exp of the mean cross-entropy over the targets that count, and how many samples there were."""
    loss, tokens, samples = 0.0, 0, 0
    for logits, targets in pairs:
        flat = targets.cpu().flatten()
        each = functional.cross_entropy(logits.flatten(0, -2).float(), flat, ignore_index=IGNORED, reduction="sum")
        loss += float(each)
        tokens += int((flat != IGNORED).sum())
        samples += len(targets)
    counted(tokens)
    try:
        return math.exp(loss / tokens), samples
    except OverflowError:  # a broken artifact can be as bad as that, and a report is JSON
        return float(torch.finfo(torch.float64).max), samples
