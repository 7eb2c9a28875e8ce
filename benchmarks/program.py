"""Static int8 as a program of torch: eager, compiled, and beside ONNX Runtime

Networks of the size of a ResNet-18 and of a BERT-mini, random weights, one sample, in turns. Seconds are those of the
processor, with one thread, so that they hold on a busy machine too. The program is loaded again from its file. How
steps and ranges were found does not matter for time, so the quickest way is taken. TERSOR_BENCH_PART names one network
by its beginning.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn
from torch._inductor import config as inductor

from app.contract.spec import Calibration, Quantize
from benchmarks.harness import in_turns, table, where
from benchmarks.int8 import _exported, _samples, _sized
from tests.worker.helpers import tiny_model
from worker.evaluation.layers import sqnr_db
from worker.export.program import open_program, save_program
from worker.export.quiet import quiet
from worker.loading.onnx_session import open_session
from worker.techniques.quantization.onnx_int8 import quantize_file
from worker.techniques.quantization.program_int8 import integer_module

ROUNDS, WARM_UP = 14, 3
STEP = Quantize(rounding="nearest", smooth=False, calibration=Calibration(method="minmax"))


def main() -> None:
    """The table."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for title, module, example in _sized():
            if title.startswith(os.environ.get("TERSOR_BENCH_PART", "")):
                rows += _measured(title, module, example[0], Path(name))
    table(["network", "form", "MB", "ms", "over eager floats", "outputs against floats, dB"], rows)
    where("torch", "onnxruntime")


def _measured(title: str, module: nn.Module, example: torch.Tensor, folder: Path) -> list[list[str]]:
    floats = _exported(module, (torch.cat([example, example]),), ["x"], folder / "float.onnx")
    generator = torch.Generator().manual_seed(1)
    shape = (16, *example.shape[1:])
    seen = torch.randn(shape, generator=generator)
    if not example.is_floating_point():
        seen = torch.randint(0, 30_000, shape, generator=generator)
    arrays = {"x": seen.numpy()}
    int8, program = folder / "int8.onnx", folder / "program.pt2"
    with quiet():
        quantize_file(floats, int8, STEP, _samples(arrays), ())
        _save(integer_module(onnx.load(int8)).module, example, program)
        loaded = open_program(program).module()
    inductor.freezing = True
    compiled = torch.compile(loaded)
    begun = time.perf_counter()
    with torch.no_grad():
        compiled(example)
    print(f"{title}: compiled in {time.perf_counter() - begun:.0f} s", flush=True)
    feed = {"x": example.numpy()}
    forms = {
        "torch, floats": (None, partial(_run, module, example)),
        "program, int8, eager": (program, partial(_run, loaded, example)),
        "program, int8, compiled": (program, partial(_run, compiled, example)),
        "ONNX Runtime, floats": (floats, partial(_single(floats).run, None, feed)),
        "ONNX Runtime, int8": (int8, partial(_single(int8).run, None, feed)),
    }
    taken = in_turns({own: partial(_seconds, call) for own, (_, call) in forms.items()}, ROUNDS)
    medians = {own: statistics.median(times[WARM_UP:]) for own, times in taken.items()}
    with torch.inference_mode():
        exact = module(seen).numpy()
        noise = {
            "program, int8, eager": sqnr_db(exact, loaded(seen).numpy()),
            "ONNX Runtime, int8": sqnr_db(exact, np.asarray(_single(int8).run(None, arrays)[0])),
        }
    first = medians["torch, floats"]
    return [
        [
            title,
            own,
            "" if path is None else f"{path.stat().st_size / 1e6:.1f}",
            f"{1e3 * medians[own]:.1f}",
            f"{first / medians[own]:.2f}",
            f"{noise[own]:.1f}" if own in noise else "",
        ]
        for own, (path, _) in forms.items()
    ]


def _seconds(call: Callable[[], object]) -> float:
    """Of the processor."""
    start = time.process_time()
    call()
    return time.process_time() - start


def _run(module: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor) -> None:
    with torch.no_grad():
        module(example)


def _single(path: Path) -> ort.InferenceSession:
    return open_session(path.read_bytes(), 1)


def _save(module: nn.Module, example: torch.Tensor, path: Path) -> None:
    model = tiny_model(module, shape=tuple(example.shape[1:]))
    (only,) = model.facts.inputs
    dtype = str(example.dtype).removeprefix("torch.")
    facts = model.facts.model_copy(update={"inputs": (only.model_copy(update={"name": "x", "dtype": dtype}),)})
    save_program(module, type(model)(module, facts, model.encode, model.save, model.task), path)
