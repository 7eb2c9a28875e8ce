"""Language models: perplexity and loss against SciPy, and what is hidden from a masked one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor

from tests.worker.helpers import score
from worker.data.base import RawBatch
from worker.data.batch import IGNORED, Batch, Inputs
from worker.objectives.language import CausalLm, MaskedLm

VOCABULARY, MASK, PAD, START = 50, 49, 48, 47
RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(0, 40, size=(6, 9))
LENGTHS = [9, 4, 7, 2, 9, 5]
VISIBLE = np.arange(9) < np.array(LENGTHS)[:, None]
TABLE = RANDOM.normal(size=(VOCABULARY, VOCABULARY)) * 2


def raw() -> Inputs:
    return torch.tensor(np.where(VISIBLE, IDS, PAD)), torch.tensor(VISIBLE.astype(np.int64))


def batch(task: CausalLm | MaskedLm) -> Batch:
    return Batch(raw(), task.targets(RawBatch([], None), raw()))


def bigram(inputs: Inputs) -> Tensor:
    """A model that predicts by the present token alone."""
    return torch.tensor(TABLE)[inputs[0]]


def test_perplexity_is_that_of_the_next_tokens() -> None:
    losses = [-log_softmax(TABLE[IDS[row, at]])[IDS[row, at + 1]] for row in range(6) for at in range(LENGTHS[row] - 1)]
    whole = batch(CausalLm())
    value, samples = score(CausalLm(), bigram, [whole])
    assert samples == 6
    assert value == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert CausalLm().loss(bigram(whole.inputs), whole).item() == pytest.approx(np.mean(losses))


def test_padding_teaches_nothing() -> None:
    whole = batch(CausalLm())
    outputs = bigram(whole.inputs).requires_grad_()
    CausalLm().divergence(outputs, torch.zeros_like(outputs), whole, 2.0).backward()
    assert outputs.grad is not None
    counted = outputs.grad.abs().sum(-1) > 0
    following = np.zeros_like(VISIBLE)
    following[:, :-1] = VISIBLE[:, 1:]
    assert counted.numpy().tolist() == following.tolist()


def test_what_is_hidden_is_berts_share_of_it() -> None:
    task = MaskedLm(MASK, [PAD, START], VOCABULARY)
    ids = torch.randint(0, 40, (400, 100), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = START, PAD
    mask = (ids != PAD).long()
    whole = Batch((ids, mask), task.targets(RawBatch([], None), (ids, mask)))
    hidden = task.prepare(whole, torch.Generator().manual_seed(2))
    assert hidden.targets is not None
    chosen = hidden.targets != IGNORED
    shown = hidden.inputs[0]
    assert torch.equal(hidden.targets[chosen], ids[chosen])
    assert torch.equal(shown[~chosen], ids[~chosen])
    assert not chosen[:, 0].any()  # a special token
    assert not chosen[:, -1].any()  # padding
    assert chosen[:, 1:-1].float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (shown[chosen] == MASK).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (shown[chosen] == ids[chosen]).float().mean().item() == pytest.approx(0.1 + 0.1 / VOCABULARY, abs=0.02)


def test_every_model_is_asked_for_the_same_hidden_tokens() -> None:
    task = MaskedLm(MASK, [PAD], VOCABULARY)
    seen: list[Tensor] = []

    def forward(inputs: Inputs) -> Tensor:
        seen.append(inputs[0])
        return bigram(inputs)

    first = score(task, forward, [batch(task)])
    torch.manual_seed(12345)
    assert score(task, forward, [batch(task)]) == first
    assert torch.equal(*seen)


def test_a_batch_in_which_nothing_was_chosen_trains_nothing() -> None:
    task = MaskedLm(MASK, [PAD], VOCABULARY)
    outputs = torch.randn(1, 2, VOCABULARY, requires_grad=True)
    none = Batch((torch.tensor([[1, 2]]),), torch.tensor([[IGNORED, IGNORED]]))
    task.loss(outputs, none).backward()
    assert outputs.grad is not None
    assert outputs.grad.abs().sum() == 0


def test_a_broken_model_has_a_perplexity_that_json_can_hold() -> None:
    ids = torch.tensor([[0, 1]])
    wrong = torch.full((1, 2, VOCABULARY), 0.0)
    wrong[..., 0] = 1e6
    value, _ = score(CausalLm(), lambda inputs: wrong, [Batch((ids,), ids)])
    assert np.isfinite(value)
