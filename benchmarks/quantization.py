"""Weights of few bits: a language model rounded five ways, and its files

SmolLM2-135M (as in `benchmarks language`, calibrated on documents of the Brown corpus, perplexity on others). Its
weights come from a file of 4 bits in groups of 32, so that all ways look better than on a model that was never
quantized. First every algorithm at 4 and at 3 bits, groups of 128 (64 where a layer's inputs are 576), with zero
points: what the step takes in time and in memory above what the loaded model holds. Then one job over HTTP, 4 bits by
GPTQ, symmetric, embeddings in 8: its artifacts, measured as every job's. Run it with PYTHONPATH=.models/python;
TERSOR_BENCH_PART=steps or files takes one part.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from app.client import Client
from app.contract.weight_only import WeightOnly
from app.launch import service
from benchmarks.harness import table, where
from benchmarks.language import CALIBRATION, perplexity, written
from worker.context import Context
from worker.data import open_data
from worker.data.feed import Feed
from worker.loading import load_model
from worker.techniques.quantization.quantize import QuantizeTechnique

ALGORITHMS = ("rtn", "hqq", "awq", "gptq", "awq+gptq")


def main() -> None:
    """The tables."""
    part = os.environ.get("TERSOR_BENCH_PART", "")
    with tempfile.TemporaryDirectory() as name:
        upload, texts = written(Path(name))
        if part in ("", "steps"):
            steps(Path(name), upload, texts)
        if part in ("", "files"):
            files(Path(name), upload, texts)
    where("torch", "transformers", "onnxruntime")


def steps(folder: Path, upload: Path, texts: Path) -> None:
    """Every algorithm on a copy of the model, in one process."""
    model = load_model(upload, "model.zip", {}, folder)
    data = open_data(texts, "data.zip", {}, folder)
    start = perplexity(model, model.module, Feed(model, data))
    rows = [["as uploaded", "", f"{start:.2f}", "", "", ""]]
    print(rows[0], flush=True)
    for bits in (4, 3):
        for algorithm in ALGORITHMS:
            own = replace(model, module=copy.deepcopy(model.module))
            feed = Feed(own, data)
            context = Context(own, model.module, feed, torch.device("cpu"), 0, folder, lambda share: None)
            step = WeightOnly.model_validate({"bits": bits, "algorithm": algorithm, "samples": CALIBRATION})
            before = _memory("VmRSS", reset=True)
            begun = time.perf_counter()
            details = QuantizeTechnique().apply(step, context)
            taken = time.perf_counter() - begun
            above = _memory("VmHWM") - before
            noise = _decibels(details["layers"])
            found = perplexity(own, own.module, feed)
            rows.append([algorithm, str(bits), f"{found:.2f}", f"{noise:.1f}", f"{taken:.0f}", f"{above / 1e6:.0f}"])
            print(rows[-1], flush=True)
    table(["algorithm", "bits", "perplexity", "SQNR, dB", "seconds", "MB above the model"], rows)


def files(folder: Path, upload: Path, texts: Path) -> None:
    """One job, and what its report says of the artifacts."""
    step = {
        "technique": "quantize",
        "method": "weight_only",
        "symmetric": True,
        "samples": CALIBRATION,
        "embeddings": 8,
    }
    wanted = {"steps": [step], "export": ["native", "onnx", "compressed-tensors", "packed"]}
    (folder / "service").mkdir()
    os.environ.pop("PYTHONPATH", None)  # packages of other people's models are no part of a service
    with service(folder / "service") as url, Client(url) as client:
        model = client.upload_model(upload, {})["id"]
        dataset = client.upload_dataset(texts)["id"]
        job = client.wait(client.submit({"model": model, "dataset": dataset, **wanted})["id"])
        assert job["state"] == "succeeded", json.dumps(job["error"])
        report = client.report(job["id"])
    rows = [_row("uploaded", report["uploaded"])]
    rows += [_row(artifact["name"], artifact["measurement"]) for artifact in report["artifacts"]]
    table(["file", "MB", "runtime", "perplexity", "ms a sample", "peak MB"], rows)
    print("\n".join(report["warnings"]))


def _row(name: str, own: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{own['size_bytes'] / 1e6:.1f}",
        own["runtime"],
        f"{own['metric']['value']:.2f}",
        f"{own['latency']['median_s'] * 1e3:.0f}",
        f"{own['peak_memory_bytes'] / 1e6:.0f}",
    ]


def _decibels(layers: Any) -> float:
    """The median over the layers."""
    found = sorted(row["sqnr_db"] for row in layers)
    return float(found[len(found) // 2])


def _memory(field: str, reset: bool = False) -> int:
    """Bytes of this process; `reset` begins a new peak."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
