"""Language models: the next token, or the hidden ones. The text is its own target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from worker.data.base import RawBatch
from worker.data.batch import IGNORED, Batch, Inputs
from worker.metrics.kinds import of_tokens
from worker.metrics.tally import Tally
from worker.objectives.base import Forward, Plain, counting, required, run
from worker.training import losses

# BERT's (Devlin, Chang, Lee & Toutanova 2018): of the chosen tokens 80 % are hidden, 10 % replaced, 10 % kept.
CHOSEN_SHARE = 0.15
HIDDEN_SHARE = 0.8
REPLACED_SHARE = 0.1
MASK_SEED = 0  # of an evaluation: every artifact is asked for the same hidden tokens


class CausalLm(Plain):
    """Logits [batch, tokens, vocabulary]; position i is judged by token i + 1."""

    metrics = of_tokens
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

    def judge(self, tally: Tally, forward: Forward, batch: Batch) -> None:
        """Every token after the first of its text."""
        _judge(tally, run(forward, batch)[:, :-1], required(batch)[:, 1:].cpu())


class MaskedLm(Plain):
    """Logits [batch, tokens, vocabulary]; judged at the tokens that were hidden."""

    metrics = of_tokens
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

    def judge(self, tally: Tally, forward: Forward, batch: Batch) -> None:
        """The hidden tokens, which a seed chose: the batch's own, so that it hides the same in every evaluation."""
        place = batch.indices[0] if batch.indices else 0
        prepared = self.prepare(batch, torch.Generator().manual_seed(MASK_SEED + place))
        _judge(tally, run(forward, prepared), required(prepared).cpu())


def _visible(inputs: Inputs) -> Tensor:
    """The ids where the attention mask, if there is one, is 1; IGNORED elsewhere."""
    ids = inputs[0]
    return torch.where(inputs[1].bool(), ids, IGNORED) if len(inputs) > 1 else ids


def _judge(tally: Tally, logits: Tensor, targets: Tensor) -> None:
    """logits [batch, tokens, vocabulary] at the targets int64 [batch, tokens] that count."""
    counts = targets != IGNORED
    chosen, wanted = logits[counts].float(), targets[counts]
    loss = functional.cross_entropy(chosen, wanted, reduction="none").double()
    values = {"perplexity": (loss,), "log_loss": (loss,), "token_accuracy": (chosen.argmax(-1) == wanted,)}
    tally.update(len(targets), len(wanted), 0, values if len(wanted) else None)
