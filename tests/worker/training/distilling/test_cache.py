"""A teacher's answers on disk: the same as asked for anew, within their bytes, and never for inputs that changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.contract.distillation import Cache
from app.contract.facts import TensorFacts
from tests.worker.helpers import context_for, convnet, memory_data, tiny_model
from tests.worker.nets import IDS, MASK, bert, model_of
from worker.context import Context
from worker.data.base import RawBatch
from worker.data.batch import Batch, Inputs
from worker.data.feed import Feed
from worker.model import Model
from worker.objectives.language import MaskedLm
from worker.training.distilling.cache import answers_kept
from worker.training.distilling.recording import Tap
from worker.training.distilling.teachers import Teacher

SAMPLES = 21
EXACT = Cache(dtype="float32")
GENERATOR = torch.Generator().manual_seed(0)


class Counting(nn.Module):
    """Counts the samples that it is asked about."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.asked = 0

    def forward(self, *inputs: Tensor) -> Tensor:
        self.asked += len(inputs[0])
        outputs: Tensor = self.inner(*inputs)
        return outputs


def digits(scratch: Path) -> tuple[Context, Counting]:
    data = memory_data({"train": (torch.randn(SAMPLES, 1, 8, 8, generator=GENERATOR), None)})
    model = tiny_model(convnet(), shape=(1, 8, 8))
    return context_for(model, data, scratch), Counting(convnet(seed=3))


def kept(context: Context, network: nn.Module, cache: Cache = EXACT, taps: tuple[Tap, ...] = (), **given: Any) -> Any:
    teacher = Teacher([network], context.model.facts.task, 4.0)
    teacher.taps = taps
    options: dict[str, Any] = {"samples": 10 * SAMPLES, "fixed": True, "mask_input": None} | given
    return answers_kept(context, context.model.task, teacher, cache, **options)


def shuffled(context: Context, size: int = 4) -> list[Batch]:
    assert context.feed is not None
    return list(context.feed.batches("train", size, shuffle=torch.Generator().manual_seed(1)))


def test_answers_are_computed_once_and_are_the_teachers(tmp_path: Path) -> None:
    context, network = digits(tmp_path)
    tap = Tap("inner.2")
    cache = kept(context, network, taps=(tap,))
    assert network.asked == SAMPLES
    for batch in shuffled(context):
        answer = cache.answer(batch)
        with torch.no_grad():
            torch.testing.assert_close(answer.outputs, network.inner(*batch.inputs))
            torch.testing.assert_close(answer.taken[tap], network.inner[:3](*batch.inputs))
    assert network.asked == SAMPLES
    assert cache.details()["teacher_answers_bytes"] == SAMPLES * 4 * (10 + 16 * 8 * 8)


def test_half_precision_takes_half_the_bytes(tmp_path: Path) -> None:
    context, network = digits(tmp_path)
    cache = kept(context, network, Cache(dtype="float16"))
    (batch, *_) = shuffled(context)
    with torch.no_grad():
        expected = network.inner(*batch.inputs).half().float()
    assert torch.equal(cache.answer(batch).outputs, expected)
    assert cache.bytes == SAMPLES * 2 * 10


def test_numbers_beyond_half_precision_stay_finite(tmp_path: Path) -> None:
    context, network = digits(tmp_path)
    with torch.no_grad():
        network.inner[8].bias.fill_(1e6)
    (batch, *_) = shuffled(context)
    said = kept(context, network, Cache(dtype="float16")).answer(batch).outputs
    assert said.unique().tolist() == [65504.0]


def test_attention_maps_are_kept_without_their_channels(tmp_path: Path) -> None:
    context, network = digits(tmp_path)
    cache = kept(context, network, taps=(Tap("inner.2", "map"),))
    assert cache.bytes == SAMPLES * 4 * (10 + 8 * 8)


def test_an_answer_is_the_same_bits_whichever_batch_asks(tmp_path: Path) -> None:
    context, network = digits(tmp_path)
    cache = kept(context, network)

    def by_sample(size: int) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for batch in shuffled(context, size):
            assert batch.indices is not None
            found |= dict(zip(batch.indices, cache.answer(batch).outputs, strict=True))
        return found

    once, again = by_sample(4), by_sample(7)
    assert all(torch.equal(once[index], again[index]) for index in range(SAMPLES))


def test_what_does_not_fit_is_asked_for_each_time(tmp_path: Path) -> None:
    context, network = digits(tmp_path)
    context.model.task.evaluation_batch = 4
    cache = kept(context, network, Cache(dtype="float32", max_bytes=12 * 40 + 39), taps=())
    assert cache.samples == 12
    network.asked = 0
    for batch in shuffled(context):
        with torch.no_grad():
            torch.testing.assert_close(cache.answer(batch).outputs, network.inner(*batch.inputs))
    assert network.asked == SAMPLES - 12


def test_inputs_that_were_changed_are_not_answered_from_the_cache(tmp_path: Path) -> None:
    context, network = digits(tmp_path)
    cache = kept(context, network)
    (batch, *_) = shuffled(context)
    changed = batch.inputs[0].clone()
    changed[1] = changed[1].flip(-1)
    for other in (replace(batch, inputs=(changed,)), replace(batch, indices=None)):
        with torch.no_grad():
            torch.testing.assert_close(cache.answer(other).outputs, network.inner(*other.inputs))


class Padding:
    """Rows of ids of unequal length, padded to the longest of a batch, on either side."""

    def __init__(self, left: bool) -> None:
        self.left = left

    def __call__(self, raw: RawBatch) -> Inputs:
        assert isinstance(raw.inputs, dict)
        rows = [row[row > 0].long() for row in raw.inputs["input"]]
        width = max(map(len, rows))
        ids, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if self.left else slice(0, len(row))
            ids[i, place], mask[i, place] = row, 1
        return ids, mask


@pytest.mark.parametrize("left", [False, True])
def test_texts_are_kept_without_their_padding(left: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    texts = torch.randint(1, 100, (SAMPLES, 12), generator=generator)
    lengths = torch.randint(1, 13, (SAMPLES, 1), generator=generator)
    texts = torch.where(torch.arange(12) < lengths, texts, 0)
    # Without positions, so that padding on the left changes nothing.
    network = bert(layers=1)
    with torch.no_grad():
        network.inner.bert.embeddings.position_embeddings.weight.zero_()
    model: Model = replace(model_of(network, IDS, MASK, classes=3), encode=Padding(left))
    context = context_for(model, memory_data({"train": (texts.float(), None)}), tmp_path)
    context.model.task.evaluation_batch = 8
    context.feed = Feed(context.model, memory_data({"train": (texts.float(), None)}))
    tap = Tap("inner.inner.bert.encoder.layer.0")
    counting = Counting(network)
    cache = kept(context, counting, taps=(tap,), mask_input=1)
    asked = counting.asked
    for batch in shuffled(context):
        answer, fresh = cache.answer(batch), Teacher([counting], "text-classification", 4.0)
        fresh.taps = (tap,)
        counted, expected = batch.inputs[1].bool(), fresh(batch.inputs)
        asked += len(batch)
        if not left:  # this network's output is that of its first place, which would be padding
            torch.testing.assert_close(answer.outputs, expected.outputs)
        torch.testing.assert_close(answer.taken[tap][counted], expected.taken[tap][counted])
    assert counting.asked == asked
    assert cache.bytes == 4 * (3 * SAMPLES + 32 * int(lengths.sum()))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"cache": Cache(max_bytes=0)}, "off"),
        ({"fixed": False}, "at random"),
        ({"samples": 2 * SAMPLES - 1}, "only once"),
        ({"cache": Cache(max_bytes=10)}, "not one batch"),
    ],
)
def test_there_is_a_reason_where_nothing_is_kept(given: dict[str, Any], reason: str, tmp_path: Path) -> None:
    context, network = digits(tmp_path)
    found = kept(context, network, **given)
    assert isinstance(found, str)
    assert reason in found


def test_tokens_that_are_hidden_at_random_are_not_kept(tmp_path: Path) -> None:
    context, network = digits(tmp_path)
    context.model = replace(context.model, task=MaskedLm(1, (), 10))
    assert kept(context, network) == "the inputs change at random"


@pytest.mark.parametrize("inputs", [(IDS,), (IDS.model_copy(update={"dtype": "float32"}), MASK)])
def test_sounds_of_open_length_are_not_kept(inputs: tuple[TensorFacts, ...], tmp_path: Path) -> None:
    """Nor ids without a mask: padding would be part of the answer."""
    context, network = digits(tmp_path)
    context.model = replace(context.model, facts=context.model.facts.model_copy(update={"inputs": inputs}))
    assert kept(context, network, mask_input=len(inputs) - 1 or None) == "the inputs have no fixed length"


def test_layers_of_another_length_than_the_texts_are_not_kept(tmp_path: Path) -> None:
    class Halving(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return ids[:, ::2, None].float()

    model = replace(model_of(Halving(), IDS, MASK, classes=1), encode=Padding(left=False))
    context = context_for(model, memory_data({"train": (torch.ones(SAMPLES, 4), None)}), tmp_path)
    assert kept(context, Halving(), mask_input=1) == "a layer's output has another length than the inputs"
