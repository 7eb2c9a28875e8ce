"""Static int8: beside ONNX Runtime's own quantizer and NNCF's, and beside floats

All three get the same float file and the same calibration samples, each with its defaults (uint8 activations, int8
weights a channel; NNCF is told where a model is a transformer). Models: a ResNet-20 trained here on Fashion-MNIST
(accuracy), all-MiniLM-L6-v2 on mails (share of mails whose nearest other one is of the same kind), magika's classifier
on files of this machine, a text detector of RapidOCR on printed words and Silero VAD on windows of speech (how far
outputs agree: no labels), Whisper tiny.en on utterances and SmolLM2-135M on passages (the word that follows, given
those before). SQNR is of the outputs for test samples against the float file's. Latencies of one sample, measured in
turns. Then what int8 gains in speed: networks of the size of a ResNet-18 and of a BERT-mini, random weights, in torch
and in ONNX Runtime.

TERSOR_BENCH_NNCF names a Python that has nncf and onnx; without it NNCF is left out. TERSOR_BENCH_MODELS takes models
alone (resnet,minilm,magika,detector,silero,whisper,smollm2). TERSOR_BENCH_PART=quality or speed
takes one part, OMP_NUM_THREADS is how many threads all of them have. Other people's models: `make models`,
TERSOR_TEST_DATA, PYTHONPATH=.models/python.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from app.contract.spec import Quantize
from benchmarks.harness import table, where
from benchmarks.int8_models import MODELS, THREADS, Arrays, Subject, batches, exported, opened, outputs
from worker.data.batch import Batch
from worker.evaluation.latency import measure_in_turns
from worker.evaluation.layers import sqnr_db
from worker.export.quiet import quiet
from worker.techniques.quantization.calibration import Samples
from worker.techniques.quantization.onnx_int8 import quantize_file


def main() -> None:
    """The tables."""
    part = os.environ.get("TERSOR_BENCH_PART", "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if part in ("", "quality"):
            quality(folder)
        if part in ("", "speed"):
            print()
            speed(folder)
    print(f"\n{THREADS} thread{'s' if THREADS > 1 else ''}", end="")
    where("torch", "onnxruntime", "onnx")


def quality(folder: Path) -> None:
    """Each model by each quantizer."""
    rows = []
    chosen = os.environ.get("TERSOR_BENCH_MODELS") or ",".join(MODELS)
    for subject in (MODELS[own](folder) for own in chosen.split(",")):
        files = {"float": (subject.path, 0.0)} | _quantized(subject, folder)
        exact = outputs(subject.path, subject.test)
        taken = _latencies({name: path for name, (path, _) in files.items()}, subject.test)
        for name, (path, spent) in files.items():
            got = outputs(path, subject.test)
            noise = "" if name == "float" else f"{sqnr_db(exact, got):.1f}"
            megabytes, seconds = f"{path.stat().st_size / 1e6:.2f}", f"{spent:.0f}" if spent else ""
            milliseconds = f"{1e3 * taken[name]:.2f}"
            rows.append([subject.name, name, megabytes, noise, subject.judge(got), milliseconds, seconds])
            print(rows[-1], flush=True)
    table(["model", "quantizer", "MB", "SQNR of outputs, dB", "judged", "ms a sample", "made in s"], rows)


def _quantized(subject: Subject, folder: Path) -> dict[str, tuple[Path, float]]:
    """The files, and how long each took; who cannot do it says so."""
    ways: dict[str, Callable[[Path], None]] = {
        "Tersor": lambda target: _ours(subject, target),
        "ONNX Runtime": lambda target: _onnxruntime(subject, target),
    }
    if os.environ.get("TERSOR_BENCH_NNCF"):
        ways["NNCF"] = lambda target: _nncf(subject, target, os.environ["TERSOR_BENCH_NNCF"])
    found = {}
    for name, way in ways.items():
        target = folder / f"{subject.path.stem}.{name}.onnx"
        begun = time.perf_counter()
        try:
            with quiet():
                way(target)
                opened(target)
        except Exception as error:  # whatever another quantizer raises
            print(f"{name} cannot quantize {subject.name}: {str(error).strip().splitlines()[-1][:160]}", flush=True)
            continue
        found[name] = target, time.perf_counter() - begun
    return found


def _ours(subject: Subject, target: Path) -> None:
    quantize_file(subject.path, target, Quantize(), _samples(subject.calibration), ())


def _samples(arrays: Arrays) -> Samples:
    held = [Batch(tuple(torch.from_numpy(value) for value in feed.values()), None) for feed in batches(arrays)]
    return Samples(lambda: held, list(arrays), len(held))


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, arrays: Arrays) -> None:
        self._left = batches(arrays)

    def get_next(self) -> Arrays | None:
        return next(self._left, None)


def _onnxruntime(subject: Subject, target: Path) -> None:
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(subject.path), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(target),
        _Reader(subject.calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _nncf(subject: Subject, target: Path, python: str) -> None:
    calibration = target.with_suffix(".npz")
    np.savez(calibration, **subject.calibration)
    script = Path(__file__).with_name("nncf_static.py")
    command = [python, str(script), str(subject.path), str(calibration), str(target)]
    command += ["transformer"] if subject.transformer else []
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or "it failed without a word")


def _latencies(files: Mapping[str, Path], arrays: Arrays) -> dict[str, float]:
    """Medians in seconds."""
    feed = {name: value[:1] for name, value in arrays.items()}
    sessions = {name: opened(path) for name, path in files.items()}
    calls = {name: partial(own.run, None, feed) for name, own in sessions.items()}
    found = measure_in_turns(calls, batch_size=1, threads=THREADS, budget_s=6.0)
    return {name: one.median_s for name, one in found.items()}


def speed(folder: Path) -> None:
    """torch, ONNX Runtime with floats, and int8, in turns."""
    rows = []
    for name, module, example in _sized():
        names = [f"x{place}" for place in range(len(example))]
        path = exported(module, tuple(torch.cat([one, one]) for one in example), names, folder / f"{name}.onnx")
        arrays = {own: torch.cat([one] * 16).numpy() for own, one in zip(names, example, strict=True)}
        target = folder / f"{name}.int8.onnx"
        with quiet():
            quantize_file(path, target, Quantize(), _samples(arrays), ())
        taken = measure_in_turns(
            {
                "torch": partial(_inferred, module, example),
                "ONNX Runtime": partial(opened(path).run, None, next(batches(arrays, 1))),
                "int8": partial(opened(target).run, None, next(batches(arrays, 1))),
            },
            batch_size=1,
            threads=THREADS,
            budget_s=20.0,
        )
        ms = {own: 1e3 * one.median_s for own, one in taken.items()}
        share = target.stat().st_size / path.stat().st_size
        rows.append(
            [
                name,
                *(f"{ms[own]:.1f}" for own in ("torch", "ONNX Runtime", "int8")),
                *(f"{ms[own] / ms['int8']:.2f}" for own in ("torch", "ONNX Runtime")),
                f"{100 * share:.1f} %",
            ]
        )
    table(["network", "torch, ms", "ONNX Runtime, ms", "int8, ms", "over torch", "over ONNX Runtime", "bytes"], rows)


def _inferred(module: nn.Module, example: tuple[torch.Tensor, ...]) -> None:
    with torch.inference_mode():
        module(*example)


def _sized() -> Iterator[tuple[str, nn.Module, tuple[torch.Tensor, ...]]]:
    from transformers import BertConfig, BertForSequenceClassification, ResNetConfig, ResNetForImageClassification

    class Logits(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.inner(given).logits
            return found

    torch.manual_seed(0)
    sizes = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
    picture = torch.randn(1, 3, 224, 224)
    yield "ResNet-18", Logits(ResNetForImageClassification(ResNetConfig(**sizes))).eval(), (picture,)
    small = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    words = torch.randint(0, 30_000, (1, 128))
    yield "BERT-mini, 128 tokens", Logits(BertForSequenceClassification(small)).eval(), (words,)
