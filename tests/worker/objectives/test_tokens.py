"""Tags of words, wherever a tokenizer cuts them."""

from __future__ import annotations

import pytest
import torch

from tests.worker.helpers import score
from worker.data.base import RawBatch
from worker.data.batch import IGNORED, Batch
from worker.objectives.tokens import TokenClassification

# [CLS] Wash ##ing ##ton is big [SEP] / [CLS] Ada [SEP] [PAD] …; of the third only one word was left.
WORDS = [[None, 0, 0, 0, 1, 2, None], [None, 0, None, None, None, None, None], [None, 0, 0, 0, 0, 0, None]]
TAGS = [torch.tensor([3, 1, 2]), torch.tensor([4]), torch.tensor([1, 2, 2])]
RAW = RawBatch([["Washington", "is", "big"], ["Ada"], ["Llanfair", "is", "far"]], TAGS)
_ = IGNORED
ALIGNED = [[_, 3, _, _, 1, 2, _], [_, 4, _, _, _, _, _], [_, 1, _, _, _, _, _]]


def test_a_tag_lies_on_the_first_token_of_its_word() -> None:
    task = TokenClassification(lambda raw: WORDS)
    targets = task.targets(RAW, (torch.zeros(3, 7),))
    assert targets is not None
    assert targets.tolist() == ALIGNED


def test_arrays_come_aligned() -> None:
    aligned = torch.tensor(ALIGNED)
    raw = RawBatch({"input_ids": torch.zeros(3, 7, dtype=torch.int64)}, aligned)
    assert TokenClassification(lambda raw: WORDS).targets(raw, (torch.zeros(3, 7),)) is aligned
    assert TokenClassification().targets(RawBatch({}, None), ()) is None


def test_accuracy_counts_words() -> None:
    logits = torch.zeros(3, 7, 5)
    logits[..., 1] = 1.0  # says 1 everywhere: right for "is" and for "Llanfair", of five words
    value, samples = score(TokenClassification(), lambda inputs: logits, [Batch((logits,), torch.tensor(ALIGNED))])
    assert value == pytest.approx(2 / 5)
    assert samples == 3
