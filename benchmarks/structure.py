"""Structured pruning: a ResNet-20 to half and a quarter of its MACs, beside torch-pruning used by hand

Trained here on Fashion-MNIST, pruned and trained again: by the prune step (granularity structured, scope auto), also
with layers fitted again in front of the training and behind cutting residual branches (resize, method connections), and
by torch-pruning (global group magnitudes, its share of channels bisected until the MACs are met), with the same
training behind all. Channels are in multiples of 8 and of 16: ONNX Runtime holds them in 16s where a processor has
AVX-512, and else in 8s. Accuracy is of the 10,000 test pictures, the mean of seeds, without those with which a way does
not reach the share; latency is that of ONNX Runtime for one picture on one thread, in turns with the network as it was.
`pip install torch-pruning==1.6.1` for it. TERSOR_BENCH_SIDE shrinks the pictures (28), TERSOR_BENCH_SAMPLES takes so
many to train on (60,000), TERSOR_BENCH_SEEDS counts the seeds (3).
"""

from __future__ import annotations

import copy
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from app.contract.budgets import Budget, TimedBudget
from app.contract.errors import InvalidSpec
from app.contract.rewiring import Rewire
from app.contract.spec import Finetune
from app.contract.structured import StructuredPrune
from app.contract.training import Training
from benchmarks.distillation import fashion
from benchmarks.harness import in_turns, ratio, table, where
from benchmarks.int8_models import opened
from benchmarks.resnet import resnet
from tests.worker.helpers import context_for, memory_data, tiny_model
from worker.context import Context
from worker.data.base import Data
from worker.evaluation.macs import module_macs
from worker.export.registry import write_onnx
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.structure.rewire import rewired
from worker.techniques.training.finetune import FinetuneTechnique

SIDE = int(os.environ.get("TERSOR_BENCH_SIDE", "28"))
SAMPLES = int(os.environ.get("TERSOR_BENCH_SAMPLES", "60000"))
SEEDS = int(os.environ.get("TERSOR_BENCH_SEEDS", "3"))
SHARES = (0.5, 0.25)
FIRST = Training(epochs=6, lr=3e-3, batch_size=128, schedule="cosine")
AGAIN = Training(epochs=3, lr=1e-3, batch_size=128, schedule="cosine")
ROUNDS, CALLS = 15, 40

CUT = 1.2  # times the share are left where connections go first

Way = Callable[[Context, float], nn.Module]


def units(round_to: int | Literal["auto"], context: Context, share: float, reconstruct: bool = False) -> nn.Module:
    """The prune step; its training comes behind it, as that of the other ways. Raises InvalidSpec for a share that such
    multiples cannot reach."""
    budget = TimedBudget(macs=share)
    step = StructuredPrune(budget=budget, scope="auto", round_to=round_to, reconstruct=reconstruct)
    PruneTechnique().apply(step, context)
    return context.model.module


def connections(context: Context, share: float) -> nn.Module:
    """The residual branches go without which most of what goes is saved, and units for the rest."""
    whole = _macs(context.model.module)
    rewired(Rewire(budget=Budget(macs=CUT * share), criterion="greedy"), context)
    left = share * whole / _macs(context.model.module)
    return context.model.module if left >= 1 else units("auto", context, left)


def torch_pruning(round_to: int, context: Context, share: float) -> nn.Module:
    """By hand: the share of channels that gives the MACs is bisected. Raises InvalidSpec as `ours` does."""
    try:
        import torch_pruning as tp
    except ImportError:
        raise SystemExit("torch-pruning is not there: pip install torch-pruning==1.6.1") from None
    example, whole = torch.zeros(1, 1, SIDE, SIDE), context.model.module

    def pruned(ratio: float) -> nn.Module:
        module = copy.deepcopy(whole)
        last = next(one for one in reversed(list(module.modules())) if isinstance(one, nn.Linear))
        pruner = tp.pruner.MagnitudePruner(
            module, example, importance=tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True,
            pruning_ratio=ratio, ignored_layers=[last], round_to=round_to,
        )  # fmt: skip
        pruner.step()
        return module

    low, high, most = 0.0, 1.0, share * _macs(whole)
    for _ in range(8):
        middle = (low + high) / 2
        if _macs(pruned(middle)) <= most:
            high = middle
        else:
            low = middle
    module = pruned(high)
    if _macs(module) > most:
        raise InvalidSpec("with every channel that may go gone, more MACs are left")
    return module


WAYS: dict[str, Way] = {
    "Tersor, multiples of 8": functools.partial(units, 8),
    "Tersor, multiples of 16": functools.partial(units, 16),
    "Tersor, multiples of 8, layers fitted again": functools.partial(units, 8, reconstruct=True),
    "Tersor, connections first": connections,
    "torch-pruning, multiples of 8": functools.partial(torch_pruning, 8),
    "torch-pruning, multiples of 16": functools.partial(torch_pruning, 16),
}


def main() -> None:
    """The table."""
    splits = {
        name: (nn.functional.adaptive_avg_pool2d(inputs, SIDE), targets)
        for name, (inputs, targets) in fashion().splits.items()
    }
    x, y = splits["train"]
    data = memory_data({"train": (x[:SAMPLES], y[:SAMPLES]), "test": splits["test"]})
    found: dict[tuple[str, float], list[tuple[float, ...]]] = {}
    dense = []
    for seed in range(SEEDS):
        with tempfile.TemporaryDirectory() as name:
            context = _context(_seeded(seed), data, Path(name), seed)
            FinetuneTechnique().apply(Finetune(training=FIRST), context)
            dense.append(_accuracy(context))
            print(f"seed {seed}: {dense[-1]:.2f} %", flush=True)
            for way, share, told in _ways(context.model.module, data, Path(name), seed):
                macs, untrained, accuracy, *others = told
                found.setdefault((way, share), []).append((macs, untrained, accuracy, dense[-1] - accuracy, *others))
                print(way, share, *(f"{one:.4g}" for one in told), flush=True)
    rows = [["as trained", str(len(dense)), "1", "", f"{statistics.mean(dense):.2f}", "", "1.00", "", ""]]
    for (way, _), told in found.items():
        means = (statistics.mean(values) for values in zip(*told, strict=True))
        macs, untrained, accuracy, lost, faster, seconds = means
        figures = [f"{one:.2f}" for one in (untrained, accuracy, lost, faster)]
        rows.append([way, str(len(told)), f"{macs:.3f}", *figures, f"{faster * macs:.0%}", f"{seconds:.1f}"])
    columns = ["way", "seeds", "MACs", "before training, %", "accuracy, %", "points lost", "times as fast"]
    table([*columns, "of what the MACs say", "seconds to prune"], rows)
    print(f"\n{SAMPLES} pictures of {SIDE} x {SIDE}, {SEEDS} seeds, {torch.get_num_threads()} threads", end="")
    where("torch", "onnxruntime", "torch-pruning")


def _seeded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return resnet()


def _ways(
    trained: nn.Module, data: Data, folder: Path, seed: int
) -> Iterator[tuple[str, float, tuple[float, float, float, float, float]]]:
    """For each way and share: MACs, accuracy before training and behind it, times as fast, and seconds."""
    before = _macs(trained)
    whole = _session(_context(trained, data, folder / "whole", seed), folder / "whole")
    for share in SHARES:
        for way, prune in WAYS.items():
            own = folder / f"{way}-{share}"
            context = _context(copy.deepcopy(trained), data, own, seed)
            begun = time.perf_counter()
            try:
                module = prune(context, share)
            except InvalidSpec as refused:
                print(way, share, refused, flush=True)
                continue
            seconds = time.perf_counter() - begun
            context = _context(module, data, own, seed)
            untrained = _accuracy(context)
            FinetuneTechnique().apply(Finetune(training=AGAIN), context)
            macs = _macs(context.model.module) / before
            yield way, share, (macs, untrained, _accuracy(context), _faster(whole, _session(context, own)), seconds)


def _macs(module: nn.Module) -> int:
    return module_macs(module.eval(), (torch.zeros(1, 1, SIDE, SIDE),))


def _context(module: nn.Module, data: Data, folder: Path, seed: int) -> Context:
    folder.mkdir(exist_ok=True)
    context = context_for(tiny_model(module, shape=(1, SIDE, SIDE)), data, folder)
    context.seed = seed
    return context


def _accuracy(context: Context) -> float:
    assert context.feed is not None
    module = context.model.module.eval()
    return 100 * context.feed.score(lambda inputs: module(*inputs), "test")[0]


def _session(context: Context, folder: Path) -> ort.InferenceSession:
    return opened(write_onnx(context.model.module, context, folder).path, 1)


def _faster(whole: ort.InferenceSession, other: ort.InferenceSession) -> float:
    """The median over rounds of how many times as fast the other is."""
    picture = np.random.default_rng(0).standard_normal((1, 1, SIDE, SIDE)).astype(np.float32)

    def timed(session: ort.InferenceSession) -> Callable[[], float]:
        name = session.get_inputs()[0].name

        def run() -> float:
            start = time.perf_counter()
            for _ in range(CALLS):
                session.run(None, {name: picture})
            return time.perf_counter() - start

        return run

    taken = in_turns({"whole": timed(whole), "other": timed(other)}, ROUNDS)
    return ratio(taken["whole"], taken["other"])
