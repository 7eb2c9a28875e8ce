"""Speech to text: CTC over frames, and encoder-decoder models that write token by token."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from app.contract.errors import DatasetMismatch
from worker.data.base import RawBatch
from worker.data.batch import IGNORED, Batch, Inputs
from worker.metrics.kinds import of_speech
from worker.metrics.tally import Tally
from worker.objectives.base import Forward, Plain, counting, required, run
from worker.training import losses

Spell = Callable[[list[str]], list[list[int]]]
"""Transcripts to token ids."""
Read = Callable[[Tensor], list[str]]
"""Token ids [batch, tokens] to text; for CTC the ids are a frame's best and still repeat."""
WORDLESS = "Every transcript of the split is empty: there is no word to be wrong."
Frames = Callable[[Inputs, int], Tensor]
"""How many of the output's frames [batch] are no padding, from the inputs and the number of output frames."""


class Ctc(Plain):
    """Logits [batch, frames, symbols]; connectionist temporal classification (Graves et al. 2006)."""

    evaluation_batch = 8

    def __init__(self, spell: Spell, read: Read, frames: Frames, blank: int) -> None:
        self._spell, self._read, self._frames, self._blank = spell, read, frames, blank

    def targets(self, raw: RawBatch, inputs: Inputs) -> Tensor | None:
        texts = transcripts(raw)
        return None if texts is None else padded(self._spell(texts))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """A mean over the batch; a transcript longer than its frames costs nothing rather than infinity."""
        targets = required(batch)
        log_probabilities = functional.log_softmax(outputs, dim=-1).transpose(0, 1)
        lengths = (targets != IGNORED).sum(1)
        frames = self._frames(batch.inputs, outputs.shape[1])
        return functional.ctc_loss(
            log_probabilities, targets.clamp(min=0), frames, lengths, blank=self._blank, zero_infinity=True
        )

    def divergence(self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float) -> Tensor:
        frames = self._frames(batch.inputs, student.shape[1]).to(student.device)
        counts = torch.arange(student.shape[1], device=student.device) < frames[:, None]
        return losses.soft_targets(student, teacher, temperature, counts)

    def tally(self) -> Tally:
        return Tally(of_speech, WORDLESS)

    def judge(self, tally: Tally, forward: Forward, batch: Batch) -> None:
        """The best path: each frame's best symbol, repeats merged, blanks dropped."""
        outputs = run(forward, batch)
        frames = self._frames(batch.inputs, outputs.shape[1]).cpu()
        best = outputs.argmax(-1)
        best[torch.arange(best.shape[1]) >= frames[:, None]] = self._blank
        judge_words(tally, self._read(best), references(batch))

    def imitated(self, forward: Forward, batch: Batch) -> Batch:
        """The batch with the best path of `forward` as targets: repeats merged, blanks dropped."""
        best = torch.as_tensor(forward(batch.inputs)).argmax(-1)
        frames = self._frames(batch.inputs, best.shape[1]).tolist()
        paths = [torch.unique_consecutive(row[:count]) for row, count in zip(best, frames, strict=True)]
        targets = padded([path[path != self._blank].tolist() for path in paths])
        # The loss takes no tensor without columns, as a batch of silence would give.
        silent = torch.full((len(best), 1), IGNORED)
        return replace(batch, targets=(targets if targets.shape[1] else silent).to(best.device))


class Transcription(Plain):
    """Logits [batch, tokens, vocabulary] of a decoder that is fed the right transcript so far (teacher forcing).

    The inputs are the encoder's and, last, the decoder's ids. `start` are the ids that every transcript begins with.
    """

    evaluation_batch = 4

    def __init__(self, read: Read, spell: Spell, start: Sequence[int], end: int, longest: int) -> None:
        self._read, self._spell, self._start, self._end, self._longest = read, spell, tuple(start), end, longest

    def decoder_inputs(self, raw: RawBatch) -> Tensor:
        """Every token of the transcripts but the last, [batch, tokens]; the start alone where there are none."""
        texts = transcripts(raw)
        if texts is None:
            return torch.tensor([self._start] * len(raw.inputs), dtype=torch.int64)
        ids = padded(self._sequences(texts))[:, :-1]
        return torch.where(ids == IGNORED, self._end, ids)

    def targets(self, raw: RawBatch, inputs: Inputs) -> Tensor | None:
        """The token after each of `decoder_inputs`; those of the start do not count."""
        texts = transcripts(raw)
        if texts is None:
            return None
        following = padded(self._sequences(texts))[:, 1:].clone()
        following[:, : len(self._start) - 1] = IGNORED
        return following

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return losses.cross_entropy(outputs, required(batch), batch.smoothing)

    def terms(self, batch: Batch) -> int:
        return counting(batch.targets)

    def divergence(self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float) -> Tensor:
        counts = None if batch.targets is None else batch.targets != IGNORED
        return losses.soft_targets(student, teacher, temperature, counts)

    def tally(self) -> Tally:
        return Tally(of_speech, WORDLESS)

    def judge(self, tally: Tally, forward: Forward, batch: Batch) -> None:
        """What the model writes on its own, the likeliest token each time."""
        judge_words(tally, self._read(self._write(forward, batch.inputs[:-1])), references(batch))

    def imitated(self, forward: Forward, batch: Batch) -> Batch:
        """The batch with what `forward` writes on its own as the transcript."""
        device = batch.inputs[0].device
        ids = self._write(forward, batch.inputs[:-1]).to(device)
        following = ids[:, 1:].clone()
        following[:, : len(self._start) - 1] = IGNORED
        ended = (following == self._end).cumsum(1)
        following[ended - (following == self._end).long() > 0] = IGNORED  # behind the end
        return replace(batch, inputs=(*batch.inputs[:-1], ids[:, :-1]), targets=following, indices=None)

    def _write(self, forward: Forward, sound: Inputs) -> Tensor:
        """Greedy decoding, [batch, tokens]; ends when every sample has said its end."""
        ids = torch.tensor([self._start] * len(sound[0]), dtype=torch.int64)
        ended = torch.zeros(len(ids), dtype=torch.bool)
        while not bool(ended.all()) and ids.shape[1] < self._longest:
            following = torch.as_tensor(forward((*sound, ids)))[:, -1].argmax(-1).cpu()
            following = torch.where(ended, self._end, following)
            ended |= following == self._end
            ids = torch.cat((ids, following[:, None]), dim=1)
        return ids

    def _sequences(self, texts: list[str]) -> list[list[int]]:
        return [[*self._start, *ids, self._end][: self._longest] for ids in self._spell(texts)]


def transcripts(raw: RawBatch) -> list[str] | None:
    """The transcripts of a raw batch. Raises DatasetMismatch where its targets are something else."""
    if raw.targets is None:
        return None
    if isinstance(raw.targets, Tensor) or not all(isinstance(text, str) for text in raw.targets):
        raise DatasetMismatch("Speech recognition needs transcripts, and the dataset has none.", pointer="/dataset")
    return [text for text in raw.targets if isinstance(text, str)]


def references(batch: Batch) -> list[str]:
    """What was really said. Raises DatasetMismatch for a batch without transcripts."""
    if batch.references is None:
        raise DatasetMismatch("The split has no transcripts, which this task is judged by.", pointer="/dataset")
    return batch.references


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [rows, longest], IGNORED behind the end of shorter rows."""
    width = max(map(len, rows), default=0)
    filled = [[*row, *[IGNORED] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64).reshape(len(rows), width)


def judge_words(tally: Tally, said: list[str], meant: list[str]) -> None:
    """Edits of what was meant, after `spoken`."""
    words = [spoken(text) for text in meant]
    both = ([spoken(text) for text in said], words)
    tally.update(len(meant), sum(map(bool, words)), 0, {"word_error_rate": both, "character_error_rate": both})


def spoken(text: str) -> str:
    """Lower case without punctuation: case and commas are not heard."""
    kept = "".join(" " if unicodedata.category(c)[0] in "PSZ" and c != "'" else c for c in text.casefold())
    return " ".join(kept.split())
