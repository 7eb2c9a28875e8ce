"""Speech: CTC against the sum over all alignments, decoding by hand, error rates by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor

from app.contract.errors import DatasetMismatch
from worker.data.base import RawBatch, Sound
from worker.data.batch import IGNORED, Batch, Inputs
from worker.objectives.speech import Ctc, Transcription, padded, spoken, word_error_rate

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
    assert task.score(lambda inputs: outputs, [batch]) == (pytest.approx(2 / 4), 2)


def test_error_rates_by_hand() -> None:
    assert word_error_rate(["the cat sat"], ["The cat, sat!"]) == (0.0, 1)
    assert word_error_rate(["a x c", ""], ["a b c d", "e"]) == (pytest.approx(3 / 5), 2)
    with pytest.raises(DatasetMismatch, match="empty"):
        word_error_rate(["a"], ["…"])


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


class Writer:
    """A decoder whose next token depends on all before it; counts its passes."""

    def __init__(self, scripts: list[list[int]]) -> None:
        self.scripts = scripts
        self.passes = 0

    def next(self, row: int, said: list[int]) -> int:
        """The script as long as it was kept to, else nonsense that a changed token changes."""
        script = self.scripts[row]
        return script[len(said)] if said == script[: len(said)] and len(said) < len(script) else sum(said) % 26

    def __call__(self, inputs: Inputs) -> Tensor:
        self.passes += 1
        ids = inputs[-1].tolist()
        first = len(START)
        best = [[self.next(row, own[first : i + 1]) for i in range(first - 1, len(own))] for row, own in enumerate(ids)]
        ignored = torch.zeros(len(ids), first - 1, 100)  # what follows the start's own tokens is not asked for
        return torch.cat((ignored, torch.eye(100)[torch.tensor(best)]), dim=1)


@pytest.mark.parametrize(("longest", "said"), [(12, ["a b c", "z"]), (4, ["a b", "z"])])
def test_it_writes_until_it_says_so_or_has_no_room(longest: int, said: list[str]) -> None:
    writer = Writer([[0, 1, 2, END], [25, END, 7, 7]])  # what comes after the end is not said
    raw = RawBatch([SOUND, SOUND], said)
    task = transcription(longest)
    inputs = (torch.zeros(2, 3), task.decoder_inputs(raw))
    assert task.score(writer, [Batch(inputs, task.targets(raw, inputs), said)]) == (0.0, 2)


@pytest.mark.parametrize(
    "guess", [[[]], [[END]], [[3, 1, 4, END]], [[0, 1, 5, 3, END]], [[9] * 30], [[0, 1, 2, 3, END]]]
)
def test_a_guess_changes_nothing_of_what_is_written(guess: list[list[int]]) -> None:
    script = [0, 1, 2, 3, END]
    writer = Writer([script])
    written = transcription(16)._write(writer, (torch.zeros(1, 3),), padded(guess))
    assert written.tolist() == [[*START, *script]]
    assert writer.passes == (1 if guess == [script] else writer.passes)
    assert writer.passes <= len(script)


def test_what_was_written_before_is_the_next_guess() -> None:
    """The first evaluation begins with what was said, the next one of a like model has nothing left to correct."""
    task = transcription()
    said = ["a b c d e f", "z"]
    raw = RawBatch([SOUND, SOUND], said)
    inputs = (torch.zeros(2, 3), task.decoder_inputs(raw))
    batch = Batch(inputs, task.targets(raw, inputs), said)
    writer = Writer([[0, 7, 2, 3, 4, 5, END], [25, END]])
    assert task.score(writer, [batch]) == (pytest.approx(1 / 7), 2)
    assert writer.passes > 1
    writer.passes = 0
    assert task.score(writer, [batch]) == (pytest.approx(1 / 7), 2)
    assert writer.passes == 1


def test_rows_of_unequal_length() -> None:
    assert padded([[1, 2], [], [3]]).tolist() == [[1, 2], [IGNORED, IGNORED], [3, IGNORED]]
    assert padded([[], []]).shape == (2, 0)  # a batch of silence
