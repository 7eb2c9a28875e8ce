"""The questions that every model is asked: does it load, compute the same, train, prune and quantize?"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from app.contract.errors import TersorError
from app.contract.spec import Finetune, Prune, Quantize
from app.contract.training import Training
from tests.models.references import Array
from worker.constraints import baked
from worker.context import Context
from worker.data.base import Data, RawBatch
from worker.data.feed import Feed
from worker.evaluation.artifact import OnnxFile, Reloaded, TorchFile
from worker.evaluation.verify import check_samples, verify
from worker.export.registry import Exported, write_native, write_onnx
from worker.inspect import examine
from worker.loading import load_model
from worker.model import Model
from worker.techniques.pruning.weights import prunable
from worker.techniques.registry import TECHNIQUES

THREADS = 2
TOLERANCE = 1e-4  # of the largest output: float32 in another order of additions
SPARSITY = 0.5
LEAST_SQNR = 10.0  # dB; what int8 changes is then less than a third of the signal
COLUMNS = ("loads", "same output", "trainable", "prunable", "quantizable")


@dataclass(frozen=True)
class Prepared:
    """A model as a client would upload it, and what its own runtime says of `samples`.

    `expected` is not a number where there is nothing to compare; `own_metric` the task's metric in the own runtime.
    """

    path: Path
    spec: dict[str, Any]
    samples: RawBatch
    expected: Array
    own_metric: float | None = None


@dataclass(frozen=True)
class Subject:
    """A model of somebody else. `prepare(folder, data)` may convert it, and writes into `folder` alone."""

    name: str
    package: str
    upload: str
    runtime: str
    data: Callable[[], Data]
    prepare: Callable[[Path, Data], Prepared]
    training: Training
    quantize: Quantize
    reads: Callable[[Tensor], Tensor] = torch.Tensor.detach
    """What the own runtime does to the outputs beyond the logits."""
    scored: bool = True
    """Whether the test split has the targets that the task's metric needs."""


@dataclass
class Row:
    """The answers for one model: by column a word, yes or why not, and beside it a figure."""

    subject: Subject
    parameters: int | None = None
    words: dict[str, str] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def say(self, column: str, figure: str, problem: str | None = None) -> None:
        self.words[column] = "yes" if problem is None else f"no: {problem}"
        self.figures[column] = figure


def ask(subject: Subject, folder: Path) -> Row:
    """All questions; a column after a failed one stays empty."""
    torch.set_num_threads(THREADS)
    row = Row(subject)
    data = subject.data()
    prepared = subject.prepare(folder, data)
    gc.collect()  # what the own runtime held
    scratch = folder / "scratch"
    scratch.mkdir()
    try:
        model = load_model(prepared.path, prepared.path.name, prepared.spec, scratch)
        row.parameters = examine(model).parameters
    except TersorError as error:
        row.say("loads", "", error.detail)
        return row
    row.say("loads", "")
    _same(row, model, prepared)
    context = _context(model, data, scratch, subject.training)
    steps = {"quantizable": _quantize, "prunable": _prune, "trainable": _train}
    for column, step in steps.items():
        try:
            step(row, context, prepared, folder)
        except TersorError as error:
            row.say(column, "", error.detail)
    return row


def _context(model: Model, data: Data, scratch: Path, training: Training) -> Context:
    teacher = model.module if training.distill is None else copy.deepcopy(model.module).requires_grad_(False)
    return Context(
        model=model,
        teacher=teacher,
        feed=Feed(model, data),
        device=torch.device("cpu"),
        seed=0,
        scratch=scratch,
        progress=lambda share: None,
    )


def _same(row: Row, model: Model, prepared: Prepared) -> None:
    """The outputs of the loaded module, fed from raw samples by its own encoding, against those of the own runtime."""
    with torch.inference_mode():
        outputs = row.subject.reads(model.module(*model.encode(prepared.samples))).numpy()
    expected = prepared.expected
    if outputs.shape != expected.shape:
        row.say("same output", "", f"shape {outputs.shape} instead of {expected.shape}")
        return
    there = ~np.isnan(expected)
    difference = float(np.abs(outputs - expected)[there].max() / max(1.0, np.abs(expected[there]).max()))
    problem = None if difference <= TOLERANCE else f"differs by {difference:.1e} of the largest"
    row.say("same output", f"{difference:.0e}", problem)


def _quantize(row: Row, context: Context, prepared: Prepared, folder: Path) -> None:
    """As a job does it: the step, the int8 file and the float one it is made from, both verified; then their worth."""
    step = row.subject.quantize
    if (reason := TECHNIQUES["quantize"].applies(step, context.model)) is not None:
        row.say("quantizable", "", reason)
        return
    TECHNIQUES["quantize"].apply(step, context)
    module = baked(context.model.module)
    exported = write_onnx(module, context, folder)
    context.quantization = None
    samples = check_samples(context.model, context.feed)
    quantized = verify(exported, module, samples, lambda one: _onnx(one, context.model))
    assert isinstance(quantized, OnnxFile)
    exact = quantized.float_reference()
    wanted, got = exact(samples), quantized(samples)
    decibels = sqnr(wanted, got)
    share = exported.path.stat().st_size / exact.path.stat().st_size
    problem = None if decibels >= LEAST_SQNR else f"{step.method} int8 leaves {decibels:.0f} dB"
    how = ", ".join([step.method, *(f"all but {pattern}" for pattern in step.exclude)])
    row.say("quantizable", f"{how}, {decibels:.0f} dB, {share:.0%} of the bytes", problem)
    _score(row, context, prepared, {"uploaded": module, "float ONNX": exact, "int8 ONNX": quantized})


def _onnx(exported: Exported, model: Model) -> Reloaded:
    assert exported.reference is not None
    return OnnxFile(exported.path, exported.reference, model.facts, THREADS)


def sqnr(exact: Array, quantized: Array) -> float:
    """The signal over what quantization changed of it, in decibels."""
    noise = np.square(exact.astype(np.float64) - quantized).sum()
    return float(10 * np.log10(np.square(exact, dtype=np.float64).sum() / max(noise, 1e-300)))


def _score(row: Row, context: Context, prepared: Prepared, runtimes: dict[str, Any]) -> None:
    """The task's metric on the test split in each runtime."""
    if not row.subject.scored:
        return
    if prepared.own_metric is not None:
        row.metrics["own runtime"] = prepared.own_metric
    assert context.feed is not None
    for name, forward in runtimes.items():
        if isinstance(forward, nn.Module):
            row.metrics[name], _ = context.feed.score(lambda inputs, own=forward: own(*inputs), "test")
        else:
            row.metrics[name], _ = context.feed.score(forward, "test")


def _prune(row: Row, context: Context, prepared: Prepared, folder: Path) -> None:
    """Half of all weights at once; counted in the file that is written and loaded again."""
    TECHNIQUES["prune"].apply(Prune(sparsity=SPARSITY), context)
    module = context.model.round_as_stored(baked(context.model.module))
    path = write_native(module, context, folder).path
    exported = Exported(path, "native", "", None)
    samples = check_samples(context.model, context.feed)

    def reload(one: Exported) -> Reloaded:
        return TorchFile(one.path, one.path.name, prepared.spec, context.scratch, THREADS)

    loaded = verify(exported, module, samples, reload)
    assert isinstance(loaded, TorchFile)
    zeros, total = zero_weights(loaded.module)
    exact = abs(zeros - SPARSITY * total) < 1
    row.say("prunable", f"{zeros / total:.4%}", None if exact else f"{zeros} of {total} weights are zero")


def zero_weights(module: nn.Module) -> tuple[int, int]:
    """How many of the weights that pruning may remove are zero, of how many."""
    values = [weight.value() for weight in prunable(module)]
    return sum(int((value == 0).sum()) for value in values), sum(value.numel() for value in values)


def _train(row: Row, context: Context, prepared: Prepared, folder: Path) -> None:
    """Some steps on the pruned model; the loss is that of the whole split `train`, without dropout, twice."""
    step = Finetune(training=row.subject.training)
    if (reason := TECHNIQUES["finetune"].applies(step, context.model)) is not None:
        row.say("trainable", "", reason)
        return
    before = _loss(context, row.subject.training)
    TECHNIQUES["finetune"].apply(step, context)
    after = _loss(context, row.subject.training)
    zeros, total = zero_weights(context.model.module)
    problem = None
    if not after < before:
        problem = f"the loss went from {before:.3g} to {after:.3g}"
    elif abs(zeros - SPARSITY * total) >= 1:
        problem = f"{zeros} of {total} weights are zero after training"
    row.say("trainable", f"loss {before:.3g} → {after:.3g}", problem)


def _loss(context: Context, training: Training) -> float:
    assert context.feed is not None
    total = samples = 0.0
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for raw in context.feed.batches("train", training.batch_size):
            batch = context.feed.task.prepare(raw, noise)
            outputs = context.model.module(*batch.inputs)
            if training.distill is None:
                loss = context.feed.task.loss(outputs, batch)
            else:
                answer = context.teacher(*batch.inputs)
                loss = context.feed.task.divergence(outputs, answer, batch, training.distill.temperature)
            total += float(loss) * len(batch)
            samples += len(batch)
    return total / samples
