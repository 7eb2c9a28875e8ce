"""What a teacher says in its own words, with teachers whose words are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from app.contract.distillation import Distill, Sequence
from tests.worker.helpers import context_for, memory_data
from tests.worker.nets import IDS, Positional, text_model
from worker.data.batch import IGNORED, Batch, Inputs
from worker.objectives.language import CausalLm
from worker.objectives.speech import Ctc, Transcription
from worker.training.distilling.imitation import continued, imitator
from worker.training.objective import objective

VOCABULARY = 10


def counting_up(inputs: Inputs) -> Tensor:
    """A language model that says the next number."""
    return functional.one_hot((inputs[0] + 1) % VOCABULARY, VOCABULARY).float()


def test_texts_are_continued_by_the_likeliest_tokens() -> None:
    ids = torch.tensor([[3, 9, 9, 9, 9], [7, 1, 1, 1, 1]])
    batch = Batch((ids,), ids, indices=(0, 1))
    found = imitator(CausalLm(), Sequence(prompt=1, tokens=3))(counting_up, batch)
    assert found.inputs[0].tolist() == [[3, 4, 5, 6], [7, 8, 9, 0]]
    assert found.targets is not None
    assert found.targets.tolist() == [[IGNORED, 4, 5, 6], [IGNORED, 8, 9, 0]]
    assert found.indices is None
    # What the teacher itself would say has no loss beyond its own uncertainty.
    assert CausalLm().loss(100 * counting_up(found.inputs), found).item() == pytest.approx(0, abs=1e-6)


def test_a_prompt_is_no_longer_than_the_shortest_text_and_knows_no_padding() -> None:
    ids = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    found = continued(counting_up, Batch((ids, mask), ids), prompt=3, tokens=9)
    assert found.inputs[0].tolist() == [[3, 4, 5, 6], [5, 6, 7, 8]]
    assert found.inputs[1].tolist() == [[1] * 4] * 2


def test_texts_of_one_token_stay() -> None:
    ids = torch.tensor([[3], [5]])
    batch = Batch((ids,), ids)
    assert continued(counting_up, batch, 1, 4) is batch


def test_a_transcript_is_what_the_teacher_writes() -> None:
    task = Transcription(lambda ids: [], lambda texts: [], start=(1, 2), end=0, longest=8)
    sound = torch.zeros(2, 4)
    says = torch.tensor([[5, 6, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0]])

    def teacher(inputs: Inputs) -> Tensor:
        place = inputs[-1].shape[1] - 2
        return functional.one_hot(says[:, : place + 1], VOCABULARY).float()[:, -1:]

    batch = Batch((sound, torch.tensor([[1, 2, 9]] * 2)), torch.tensor([[IGNORED, 9, 0]] * 2))
    found = task.imitated(teacher, batch)
    assert found.inputs[-1].tolist() == [[1, 2, 5, 6], [1, 2, 7, 0]]
    assert found.targets is not None
    assert found.targets.tolist() == [[IGNORED, 5, 6, 0], [IGNORED, 7, 0, IGNORED]]


def test_the_best_path_of_frames_is_a_transcript() -> None:
    frames = torch.tensor([4, 3])
    task = Ctc(lambda texts: [], lambda ids: [], lambda inputs, count: frames, blank=0)
    best = torch.tensor([[1, 1, 0, 1], [2, 2, 2, 9]])
    sounds = Batch((torch.zeros(2, 8),), None)
    found = task.imitated(lambda inputs: functional.one_hot(best, VOCABULARY).float(), sounds)
    assert found.targets is not None
    assert found.targets.tolist() == [[1, 1], [2, IGNORED]]
    silence = task.imitated(lambda inputs: functional.one_hot(0 * best, VOCABULARY).float(), sounds)
    loss = task.loss(torch.zeros(2, 4, VOCABULARY), silence)
    assert bool(loss.isfinite())


def test_a_teacher_that_is_distilled_sequence_by_sequence(tmp_path: Path) -> None:
    """Through the objective: the student's loss is that of the teacher's own words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
    )
    nets = [Positional(LlamaForCausalLM(config).eval(), "input_ids") for _ in range(2)]
    model = text_model(nets[0], classes=VOCABULARY)
    facts = model.facts.model_copy(update={"task": "causal-lm", "inputs": (IDS,)})
    model = replace(model, task=CausalLm(), facts=facts)
    context = context_for(model, memory_data({"train": (torch.zeros(2, 6), None)}), tmp_path, teacher=nets[1])
    distill = Distill.model_validate({"losses": [{"kind": "sequence", "prompt": 2}], "alpha": 1.0})
    loss = objective(context, model.task, distill, samples=0)
    ids = torch.tensor([[1, 2, 3, 4, 5], [2, 3, 4, 5, 6]])
    written = ids[:, :2]
    with torch.no_grad():
        while written.shape[1] < 5:
            written = torch.cat((written, nets[1](written)[:, -1:].argmax(-1)), 1)
        logits = nets[0](written)[:, 1:-1]
        expected = functional.cross_entropy(logits.flatten(0, 1), written[:, 2:].flatten())
    torch.testing.assert_close(loss(Batch((ids,), ids)).detach(), expected)
