"""Static int8 or dynamic: both files are made, and the better one is delivered. Which it is cannot be told beforehand:
of transformers some are nearer to their floats, and faster, with ranges that are found as activations come."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from app.contract.errors import ExportFailed
from app.contract.spec import Quantize
from worker.evaluation.latency import measure_in_turns
from worker.loading.onnx_session import open_session
from worker.techniques.base import Details
from worker.techniques.quantization.calibration import Samples
from worker.techniques.quantization.int8_graph import Int8Graph
from worker.techniques.quantization.leaving import Limit
from worker.techniques.quantization.onnx_int8 import quantize_file
from worker.techniques.quantization.static.observing import Observed, noise_db

NEARER_DB = 1.0  # less is no difference to speak of, and the faster one is taken
SLOWER = 1.2  # times as long is too dear for being nearer
SMALLER = 0.95  # of the bytes, or less, is worth more than time, where both hold what they have to
BUDGET_S = 1.0  # for all runs that are timed


@dataclass(frozen=True)
class Tried:
    """What a file gives beside the float model's outputs for the calibration samples, what a sample takes, the file's
    bytes, and whether it holds the limit; None where there is none."""

    sqnr_db: float
    median_s: float
    size_bytes: int = 0
    held: bool | None = None


def quantize_either(
    source: Path,
    target: Path,
    step: Quantize,
    samples: Samples,
    float_layers: Collection[str],
    limit: Limit | None = None,
) -> Int8Graph:
    """As `quantize_file`, by either method; the details say what was tried, which one was taken, and why.

    Where one of the two fails it is the other; where both do, what static int8 failed by is raised.
    """
    files: dict[str, Path] = {}
    made: dict[str, Int8Graph] = {}
    failed: dict[str, ExportFailed] = {}
    for method in ("static", "dynamic"):
        files[method] = source.with_name(f"{source.stem}-{method}{source.suffix}")
        try:
            way = step.model_copy(update={"method": method})
            made[method] = quantize_file(source, files[method], way, samples, float_layers, limit)
        except ExportFailed as failure:
            failed[method] = failure
    if not made:
        raise failed["static"]
    tried = _tried(source, made, samples)
    chosen, why = better(tried)
    if failed:
        why = " ".join(f"Method {method} failed: {failure.detail}" for method, failure in failed.items())
    shutil.copyfile(files[chosen], target)
    details: Details = {
        "method": chosen,
        "why": why,
        "methods": [
            {
                "method": method,
                "sqnr_db": one.sqnr_db if np.isfinite(one.sqnr_db) else None,
                "median_s": one.median_s,
                "size_bytes": one.size_bytes,
            }
            for method, one in tried.items()
        ],
    }
    return Int8Graph(target, source, made[chosen].floats, details | made[chosen].details)


def better(tried: Mapping[str, Tried]) -> tuple[str, str]:
    """The method to take, and a sentence: the nearer one, by NEARER_DB or more, unless it takes more than SLOWER times
    as long; else the faster one. Where there is a limit, one that holds it, and of two the smaller or the faster."""
    for sound, why in (
        ([name for name, one in tried.items() if np.isfinite(one.sqnr_db)], "gives finite numbers"),
        ([name for name, one in tried.items() if one.held], "holds the max_accuracy_drop"),
    ):
        if len(sound) == 1:
            return sound[0], f"{sound[0]} alone {why}."
    if all(one.held for one in tried.values()):
        return _of_those_that_hold(tried)
    nearest = max(tried, key=lambda method: tried[method].sqnr_db)
    fastest = min(tried, key=lambda method: tried[method].median_s)
    if nearest == fastest:
        return nearest, f"{nearest} is the nearer to the float model, and the faster."
    gain = tried[nearest].sqnr_db - tried[fastest].sqnr_db
    times = tried[nearest].median_s / tried[fastest].median_s
    told = f"{nearest} is nearer to the float model by {gain:.1f} dB and takes {times:.2f} times as long"
    if gain >= NEARER_DB and times <= SLOWER:
        return nearest, f"{told}."
    return fastest, f"{told}, for which {fastest} is taken."


def _of_those_that_hold(tried: Mapping[str, Tried]) -> tuple[str, str]:
    smallest = min(tried, key=lambda method: tried[method].size_bytes)
    fastest = min(tried, key=lambda method: tried[method].median_s)
    share = tried[smallest].size_bytes / max(one.size_bytes for one in tried.values())
    if share <= SMALLER:
        return smallest, f"Both hold the max_accuracy_drop, and {smallest} takes {share:.0%} of the other's bytes."
    return fastest, f"Both hold the max_accuracy_drop, and {fastest} is the faster."


def _tried(source: Path, made: Mapping[str, Int8Graph], samples: Samples) -> dict[str, Tried]:
    observed = Observed(onnx.load(source), samples)
    noise = {method: noise_db(observed, onnx.load(graph.path)) for method, graph in made.items()}
    rivals = {method: _run(graph.path, samples) for method, graph in made.items()}
    taken = measure_in_turns(rivals, batch_size=1, threads=torch.get_num_threads(), budget_s=BUDGET_S)
    held = {method: bool(graph.details["held"]) for method, graph in made.items() if "held" in graph.details}
    return {
        method: Tried(noise[method], taken[method].median_s, graph.path.stat().st_size, held.get(method))
        for method, graph in made.items()
    }


def _run(file: Path, samples: Samples) -> Callable[[], object]:
    """The file on a sample; on a batch, where it takes nothing else."""
    session = open_session(file.read_bytes(), torch.get_num_threads())
    feed = next(iter(samples))
    one = {name: value[:1] for name, value in feed.items()}
    try:
        session.run(None, one)
    except Exception:  # of the runtime, whose errors share no class
        one = feed
    return lambda: session.run(None, one)
