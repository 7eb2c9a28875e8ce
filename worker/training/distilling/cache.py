"""A teacher's answers on disk: computed once, in the order of the split, before the first step.

In one pass rather than as batches come: an answer is then the same bits whichever batch asks for it, and whether a
training began at its first step or goes on in the middle.
"""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.contract.distillation import Cache
from worker.context import Context
from worker.data.batch import Batch, Inputs
from worker.objectives.base import Task, prepares
from worker.techniques.base import Details
from worker.training.distilling.recording import Tap
from worker.training.distilling.teachers import Teacher
from worker.training.distilling.views import Answer

# What a job may write in all, and what is left of the disk: others need the rest.
SHARE_OF_DISK = 2
# Float32 sums of one sample in other batches differ in their last digits; augmentation changes the first ones.
SAME = 1e-3
OUTPUTS = Tap("", "output")


@dataclass
class _Table:
    """One tensor a sample, one behind the other in a file. `ragged` rows hold the visible tokens alone."""

    path: Path
    ragged: bool
    shape: tuple[int, ...] = ()
    lengths: list[int] = field(default_factory=list)
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    starts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def seal(self, dtype: np.dtype[np.floating]) -> None:
        """Opens the file for reading: [samples, …], or [tokens of all samples, features] where rows are ragged."""
        mapped = np.memmap(self.path, dtype, mode="c").reshape(-1, *self.shape)  # nobody writes to it
        self.values = torch.from_numpy(np.asarray(mapped))
        self.starts = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))

    def read(self, indices: Tensor) -> Tensor:
        """Rows one behind the other, in float32."""
        if not self.ragged:
            return self.values.index_select(0, indices).float()
        return torch.cat([self.values[self.starts[i] : self.starts[i + 1]] for i in indices.tolist()]).float()


class _OtherLength(Exception):
    """A layer gives more or fewer places than its inputs have tokens."""


class AnswerCache:
    """Answers to the first samples of a split, as many as fit; the teacher is asked for the others each time."""

    def __init__(self, teacher: Teacher, folder: Path, cache: Cache, mask_input: int | None, ragged: bool) -> None:
        self._teacher = teacher
        self._folder = folder
        self._dtype = np.dtype(cache.dtype)
        self._largest = float(np.finfo(self._dtype).max)
        self._mask_input = mask_input
        self._ragged = ragged
        self._tables: dict[Tap, _Table] = {}
        self._seen: list[Tensor] = []
        self._prints = torch.empty(0)
        # One that came back as it was does so again: what changes at random is not the same even once.
        self._recognized = torch.zeros(0, dtype=torch.bool)
        self._all_recognized = False
        self.samples = 0
        self.bytes = 0

    def fill(self, batches: Iterable[Batch], limit: int) -> None:
        """Asks the teacher for batches in the order of the split until the next one would go beyond `limit` bytes."""
        for batch in batches:
            answer = self._teacher(batch.inputs)
            rows = self._rows(answer, batch.inputs)
            size = sum(array.nbytes for array in rows.values())
            if self.bytes + size > limit:
                break
            self._append(rows, batch.inputs)
            self.samples += len(batch)
            self.bytes += size
        if self.samples:
            self._prints = torch.cat(self._seen)
            self._recognized = torch.zeros(self.samples, dtype=torch.bool)
            for table in self._tables.values():
                table.seal(self._dtype)

    def answer(self, batch: Batch) -> Answer:
        """The teacher's answer, out of the cache for the samples that are in it as they are."""
        if batch.indices is None:
            return self._teacher(batch.inputs)
        indices = torch.tensor(batch.indices)
        held = self._held(batch, indices)
        if not bool(held.any()):
            return self._teacher(batch.inputs)
        whole = bool(held.all())
        known = self._read(batch, indices if whole else indices[held], held, whole)
        if whole:
            return known
        here = held.to(batch.inputs[0].device)
        others = self._teacher(tuple(tensor[~here] for tensor in batch.inputs))
        return Answer(
            _merged(known.outputs, others.outputs, here),
            {tap: _merged(known.taken[tap], others.taken[tap], here) for tap in known.taken},
        )

    def details(self) -> Details:
        """For the report."""
        return {
            "teacher_answers": f"computed once, kept as {self._dtype.name}",
            "teacher_answers_kept": self.samples,
            "teacher_answers_bytes": self.bytes,
        }

    def _rows(self, answer: Answer, inputs: Inputs) -> dict[Tap, NDArray[np.floating]]:
        mask = self._mask(inputs)
        rows = {}
        for tap, tensor in {OUTPUTS: answer.outputs, **answer.taken}.items():
            table = self._tables.get(tap)
            if table is None:
                ragged = mask is not None and tensor.ndim > 2
                path = self._folder / f"{len(self._tables)}.bin"
                table = self._tables[tap] = _Table(path, ragged, tuple(tensor.shape[2 if ragged else 1 :]))
            if table.ragged and mask is not None and tensor.shape[:2] != mask.shape:
                raise _OtherLength
            kept = tensor[mask] if table.ragged and mask is not None else tensor
            rows[tap] = kept.detach().float().clamp(-self._largest, self._largest).cpu().numpy().astype(self._dtype)
        return rows

    def _append(self, rows: dict[Tap, NDArray[np.floating]], inputs: Inputs) -> None:
        mask = self._mask(inputs)
        lengths = [] if mask is None else mask.sum(1).tolist()
        for tap, array in rows.items():
            table = self._tables[tap]
            table.lengths += lengths
            with table.path.open("ab") as file:
                array.tofile(file)
        self._seen.append(_fingerprints(inputs, mask).cpu())

    def _held(self, batch: Batch, indices: Tensor) -> Tensor:
        """Which samples of a batch are kept, bool [batch]: by their place, and as they were when they were asked."""
        if self._all_recognized and max(batch.indices or ()) < self.samples:
            return torch.ones(len(batch), dtype=torch.bool)
        known = indices < self.samples
        if self.samples == 0:
            return known
        places = indices.clamp(max=self.samples - 1)
        if bool(self._recognized[places].all()):
            return known
        now = _fingerprints(batch.inputs, self._mask(batch.inputs)).cpu()
        then = self._prints[places]
        held = known & ((now - then).abs() <= SAME * (1 + then.abs()))
        self._recognized[places[held]] = True
        self._all_recognized = bool(self._recognized.all())
        return held

    def _read(self, batch: Batch, indices: Tensor, held: Tensor, whole: bool) -> Answer:
        """The kept answers, in the shapes of the whole batch; rows that are not kept are zeros."""
        mask = self._mask(batch.inputs)
        found = {tap: self._placed(table, indices, held, whole, mask, batch) for tap, table in self._tables.items()}
        return Answer(found.pop(OUTPUTS), found)

    def _placed(
        self, table: _Table, indices: Tensor, held: Tensor, whole: bool, mask: Tensor | None, batch: Batch
    ) -> Tensor:
        device = batch.inputs[0].device
        rows = table.read(indices).to(device)
        if whole and not table.ragged:
            return rows
        where = held.to(device)
        if not table.ragged or mask is None:
            placed = rows.new_zeros((len(batch), *table.shape))
        else:
            placed = rows.new_zeros((*mask.shape, *table.shape))
            where = where[:, None] & mask
        placed[where] = rows
        return placed

    def _mask(self, inputs: Inputs) -> Tensor | None:
        if not self._ragged or self._mask_input is None:
            return None
        return inputs[self._mask_input].bool()


def answers_kept(
    context: Context,
    task: Task,
    teacher: Teacher,
    cache: Cache,
    mask_input: int | None,
    *,
    samples: int,
    fixed: bool,
) -> AnswerCache | str:
    """The filled cache of the split `train`, or why there is none."""
    feed = context.feed
    assert feed is not None  # a training has data
    open_length = any(size is None for tensor in context.model.facts.inputs for size in tensor.shape)
    tokens = mask_input is not None and context.model.facts.inputs[0].dtype.startswith("int")
    reason = _unfit(task, teacher, cache, fixed, open_length, tokens)
    if reason is None and samples < 2 * feed.size("train"):
        reason = "the training sees most samples only once"
    if reason is not None:
        return reason
    folder = Path(tempfile.mkdtemp(prefix="answers-", dir=context.scratch))
    made = AnswerCache(teacher, folder, cache, mask_input, open_length)
    batches = feed.batches("train", task.evaluation_batch)
    try:
        made.fill((batch.to(context.device) for batch in batches), _limit(cache, folder))
    except _OtherLength:
        return "a layer's output has another length than the inputs"
    return made if made.samples else "not one batch of answers fits the cache"


def _unfit(task: Task, teacher: Teacher, cache: Cache, fixed: bool, open_length: bool, tokens: bool) -> str | None:
    """Why answers cannot be kept, None where they can. `tokens` says that the inputs are ids with an attention mask."""
    if cache.max_bytes == 0:
        return "the cache is off"
    if not fixed or prepares(task):
        return "the inputs change at random"
    if open_length and (not tokens or any(tap.side == "attention" for tap in teacher.taps)):
        return "the inputs have no fixed length"
    return None


def _limit(cache: Cache, folder: Path) -> int:
    """Bytes that may be written: what is asked for, within half of what the job may write and of what is free."""
    allowed = [cache.max_bytes, shutil.disk_usage(folder).free // SHARE_OF_DISK]
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != resource.RLIM_INFINITY:
        allowed.append(soft // SHARE_OF_DISK)
    return min(allowed)


def _fingerprints(inputs: Inputs, mask: Tensor | None) -> Tensor:
    """float32 [batch]: equal for equal samples; with a mask, wherever their padding lies."""
    if mask is not None:
        ramp = mask.cumsum(1).cos()
        same = [torch.where(mask, tensor, 0) for tensor in inputs if tensor.shape == mask.shape]
        return torch.stack([(tensor * ramp).sum(1) for tensor in same]).sum(0)
    total = torch.zeros(len(inputs[0]), device=inputs[0].device)
    for tensor in inputs:
        flat = tensor.flatten(1).float()
        total = total + flat @ torch.arange(flat.shape[1], device=flat.device).float().cos()
    return total


def _merged(known: Tensor, others: Tensor, here: Tensor) -> Tensor:
    """`known` with the rows that are not `here` filled by `others`."""
    merged = known.clone()
    merged[~here] = others.to(merged.dtype)
    return merged
