"""What a teacher says in its own words, as a batch to learn from (Kim & Rush 2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from app.contract.distillation import Sequence
from app.contract.errors import Unsupported
from worker.data.batch import IGNORED, Batch, Inputs
from worker.objectives.base import Task
from worker.objectives.language import CausalLm
from worker.objectives.speech import Ctc, Transcription

Ask: TypeAlias = Callable[[Inputs], Tensor]
Imitate: TypeAlias = Callable[[Ask, Batch], Batch]


def imitator(task: Task, loss: Sequence) -> Imitate:
    """How a task's batches are made of a teacher's own words. Raises Unsupported for a task without words."""
    if isinstance(task, CausalLm):
        return lambda ask, batch: continued(ask, batch, loss.prompt, loss.tokens)
    if isinstance(task, Ctc | Transcription):
        return task.imitated
    raise Unsupported("sequence is for models that write: causal language models and speech recognition.")


def continued(ask: Ask, batch: Batch, prompt: int, tokens: int) -> Batch:
    """Texts that begin as those of the batch and go on with the likeliest token each time; only the latter count.

    No longer than the batch, and the prompt no longer than its shortest text: a text of one token is a prompt as well.
    """
    ids, mask = batch.inputs[0], batch.inputs[1] if len(batch.inputs) > 1 else None
    if len(batch.inputs) > 2:
        raise Unsupported("sequence takes language models of ids and an attention mask; this one has more inputs.")
    shown = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    given = min(prompt, int(shown.sum(1).min()), ids.shape[1] - 1)
    if given < 1:
        return batch  # nothing to begin with, or no room to go on
    written = torch.stack([row[own][:given] for row, own in zip(ids, shown, strict=True)])
    for _ in range(min(tokens, ids.shape[1] - given)):
        following = ask(_inputs(written, mask))[:, -1].argmax(-1, keepdim=True)
        written = torch.cat((written, following), dim=1)
    targets = written.clone()
    targets[:, :given] = IGNORED
    return replace(batch, inputs=_inputs(written, mask), targets=targets, indices=None)


def _inputs(ids: Tensor, mask: Tensor | None) -> Inputs:
    return (ids,) if mask is None else (ids, torch.ones_like(ids, dtype=mask.dtype))
