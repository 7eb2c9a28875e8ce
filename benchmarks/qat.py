"""Quantization-aware training: beside rounding after the training, at 8 bits and at few

A LeNet-5 trained here on Fashion-MNIST, all 60,000 pictures, with a step for each output of a layer. 8 bits are the
int8 files, weights and activations, in ONNX Runtime; fewer are weights alone, in torch. Trainings are distilled from
the floats, without labels; gptq and the ranges see 256 pictures. Accuracy on the 10,000 test pictures.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from app.contract.distillation import Distill
from app.contract.qat import Qat
from app.contract.spec import Finetune, Quantize
from app.contract.training import Training
from app.contract.weight_only import WeightOnly
from benchmarks.distillation import fashion
from benchmarks.harness import table, where
from tests.worker.helpers import context_for, memory_data, tiny_model
from tests.worker.nets import lenet
from worker.constraints import baked
from worker.context import Context
from worker.data.base import Data
from worker.export.registry import write_onnx
from worker.techniques.quantization.quantize import QuantizeTechnique
from worker.techniques.training.finetune import FinetuneTechnique

FIRST = Training(epochs=8, lr=2e-3, batch_size=128, schedule="cosine")
AWARE = Training(epochs=4, lr=5e-4, batch_size=128, schedule="cosine", distill=Distill())
CALIBRATION = 256


def main() -> None:
    """The table."""
    with tempfile.TemporaryDirectory() as name:
        rows = list(_rows(Path(name)))
    table(["bits", "way", "accuracy, %", "to the floats, points", "seconds"], rows)
    threads = torch.get_num_threads()
    print(f"\n{threads} thread{'s' if threads > 1 else ''}", end="")
    where("torch", "onnxruntime")


def _rows(folder: Path) -> list[list[str]]:
    data = _data()
    context = _context(lenet(), data, folder / "floats")
    begun = time.perf_counter()
    FinetuneTechnique().apply(Finetune(training=FIRST), context)
    floats = context.model.module
    exact = _accuracy(_module(floats), context)
    found = [["32", "floats", f"{exact:.2f}", "", f"{time.perf_counter() - begun:.0f}"]]
    for bits, way, step in _steps():
        own = _context(copy.deepcopy(floats), data, folder / f"{bits} {way}")
        begun = time.perf_counter()
        QuantizeTechnique().apply(step, own)
        answers = _file(own) if bits == 8 else _module(own.model.module)
        spent, right = time.perf_counter() - begun, _accuracy(answers, own)
        found.append([str(bits), way, f"{right:.2f}", f"{right - exact:+.2f}", f"{spent:.0f}"])
        print(found[-1], flush=True)
    return found


def _steps() -> list[tuple[int, str, Any]]:
    found: list[tuple[int, str, Any]] = [
        (8, "static", Quantize()),
        (8, "qat, steps fixed", Qat(steps="fixed", training=AWARE)),
        (8, "qat, steps learned", Qat(training=AWARE)),
    ]
    for bits in (4, 3, 2):
        grid: dict[str, Any] = {"bits": bits, "group_size": None, "symmetric": True}
        found += [
            (bits, "rtn", WeightOnly(**grid, algorithm="rtn")),
            (bits, "gptq", WeightOnly(**grid, samples=CALIBRATION)),
            (bits, "qat, steps fixed", Qat(**grid, steps="fixed", training=AWARE)),
            (bits, "qat, steps learned", Qat(**grid, training=AWARE)),
        ]
    return found


def _data() -> Data:
    splits = fashion().splits
    calibration = splits["train"][0][:CALIBRATION], None
    return memory_data({"train": splits["train"], "calibration": calibration, "test": splits["test"]})


def _context(module: nn.Module, data: Data, folder: Path) -> Context:
    folder.mkdir()
    context = context_for(tiny_model(module, shape=(1, 28, 28)), data, folder)
    context.teacher = copy.deepcopy(module).eval().requires_grad_(False)
    return context


def _module(module: nn.Module) -> Callable[[torch.Tensor], np.ndarray]:
    plain = baked(module)

    def answers(inputs: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = plain(inputs).numpy()
        return found

    return answers


def _file(context: Context) -> Callable[[torch.Tensor], np.ndarray]:
    made = write_onnx(baked(context.model.module).cpu(), context, context.scratch)
    session = ort.InferenceSession(str(made.path))
    return lambda inputs: session.run(None, {"input": inputs.numpy()})[0]


def _accuracy(answers: Callable[[torch.Tensor], np.ndarray], context: Context) -> float:
    """In percent, on the test split."""
    assert context.feed is not None
    right = total = 0
    for batch in context.feed.batches("test", 500):
        assert batch.targets is not None
        right += int((answers(batch.inputs[0]).argmax(1) == batch.targets.numpy()).sum())
        total += len(batch)
    return 100 * right / total
