"""Speech: CTC against the sum over all alignments, decoding by hand, error rates by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor

from app.contract.errors import DatasetMismatch
from tests.worker.helpers import score
from worker.data.base import RawBatch, Sound
from worker.data.batch import IGNORED, Batch, Inputs
from worker.metrics.kinds import of_speech
from worker.metrics.tally import Tally
from worker.objectives.speech import WORDLESS, Ctc, Transcription, judge_words, padded, spoken

SYMBOLS = "_ab "  # the blank first
SOUND = Sound(torch.zeros(4), 4)


def collapse(path: tuple[int, ...]) -> str:
    return "".join(SYMBOLS[s] for s, _ in itertools.groupby(path) if s != 0)


def ctc(frames: list[int] | None = None) -> Ctc:
    return Ctc(
        spell=lambda texts: [[SYMBOLS.index(c) for c in text] for text in texts],
        read=lambda ids: [collapse(tuple(row)) for row in ids.tolist()],
        frames=lambda inputs, given: torch.tensor(frames or [given] * len(inputs[0])),
        blank=0,
    )


def batch_of(task: Ctc, texts: list[str], inputs: Inputs) -> Batch:
    raw = RawBatch([SOUND] * len(texts), texts)
    return Batch(inputs, task.targets(raw, inputs), texts)


def test_the_loss_is_that_of_all_alignments() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 5, 4))
    texts, frames = ["ab", "a"], [5, 3]
    wanted = []
    for row, text, length in zip(log_softmax(logits, axis=-1), texts, frames, strict=True):
        paths = (path for path in itertools.product(range(4), repeat=length) if collapse(path) == text)
        total = np.logaddexp.reduce([sum(row[t, s] for t, s in enumerate(path)) for path in paths])
        wanted.append(-total / len(text))  # torch's mean is over the symbols of each target, then the batch
    task = ctc(frames)
    batch = batch_of(task, texts, (torch.zeros(2, 5),))
    assert task.loss(torch.tensor(logits), batch).item() == pytest.approx(np.mean(wanted))


def one_hot(rows: list[str]) -> Tensor:
    return torch.stack([torch.eye(4)[[SYMBOLS.index(c) for c in row]] for row in rows])


def test_the_best_path_is_read_without_repeats_blanks_and_padding() -> None:
    task = ctc([8, 4])
    outputs = one_hot(["aa_a  bb", "b__bab a"])  # the second ends after four frames
    batch = batch_of(task, ["aa b", "b a"], (outputs,))
    # "aa b" is right; "bb" against "b a": one word changed, one missing. Four words were meant.
    assert score(task, lambda inputs: outputs, [batch]) == (pytest.approx(2 / 4), 2)


def error_rates(*batches: tuple[list[str], list[str]]) -> tuple[float, int, float]:
    """Of words, over how many samples, and of characters."""
    tally = Tally(of_speech, WORDLESS)
    for said, meant in batches:
        judge_words(tally, said, meant)
    found = tally.scores()
    return found.value, found.samples, found.others["character_error_rate"]


def test_error_rates_by_hand() -> None:
    assert error_rates((["the cat sat"], ["The cat, sat!"])) == (0.0, 1, 0.0)
    # Of five words one is wrong and two are missing; of eight characters, spaces too, one is wrong and three missing.
    assert error_rates((["a x c", ""], ["a b c d", "e"])) == (pytest.approx(3 / 5), 2, pytest.approx(4 / 8))


def test_what_is_said_where_nothing_was_counts_in_any_batch() -> None:
    together = error_rates((["a b", "c"], ["a b", ""]))
    assert together == error_rates((["a b"], ["a b"]), (["c"], [""])) == (0.5, 2, pytest.approx(1 / 3))
    with pytest.raises(DatasetMismatch, match="no word to be wrong"):
        error_rates((["a"], ["…"]))


def test_what_is_spoken_has_no_case_and_no_commas() -> None:
    assert spoken("  Don't —  STOP, “Straße”! ") == "don't stop strasse"


START, END = (90, 91), 99


def transcription(longest: int = 12) -> Transcription:
    return Transcription(
        read=lambda ids: [" ".join(chr(97 + i) for i in row if i < 26) for row in ids.tolist()],
        spell=lambda texts: [[ord(word) - 97 for word in text.split()] for text in texts],
        start=START,
        end=END,
        longest=longest,
    )


def test_a_decoder_is_fed_what_precedes_each_target() -> None:
    raw = RawBatch([SOUND, SOUND], ["a b", "c"])
    task = transcription()
    assert task.decoder_inputs(raw).tolist() == [[90, 91, 0, 1], [90, 91, 2, 99]]
    targets = task.targets(raw, ())
    assert targets is not None
    assert targets.tolist() == [[IGNORED, 0, 1, 99], [IGNORED, 2, 99, IGNORED]]
    assert task.decoder_inputs(RawBatch([SOUND, SOUND], None)).tolist() == [[90, 91], [90, 91]]


@pytest.mark.parametrize(("longest", "said"), [(12, ["a b c", "z"]), (4, ["a b", "z"])])
def test_it_writes_until_it_says_so_or_has_no_room(longest: int, said: list[str]) -> None:
    scripts = [[0, 1, 2, END], [25, END, 7, 7]]  # what comes after the end is not said

    def forward(inputs: Inputs) -> Tensor:
        ids = inputs[-1]
        logits = torch.zeros(2, ids.shape[1], 100)
        for row, script in enumerate(scripts):
            logits[row, -1, script[ids.shape[1] - len(START)]] = 1.0
        return logits

    raw = RawBatch([SOUND, SOUND], said)
    task = transcription(longest)
    inputs = (torch.zeros(2, 3), task.decoder_inputs(raw))
    assert score(task, forward, [Batch(inputs, task.targets(raw, inputs), said)]) == (0.0, 2)


def test_rows_of_unequal_length() -> None:
    assert padded([[1, 2], [], [3]]).tolist() == [[1, 2], [IGNORED, IGNORED], [3, IGNORED]]
    assert padded([[], []]).shape == (2, 0)  # two samples of silence
