"""Bits a layer: as many bytes as uniform bits, shared out by measured sensitivity

A LeNet-5 and a ResNet-20 (this one for 14 x 14 pixels) trained here on 6,000 pictures of Fashion-MNIST. Each is rounded
to uniform bits and to mixed ones with at most the same bytes (codes and steps, a step an output), by rounding to the
nearest and by GPTQ; then, by GPTQ, to the fewest bytes that hold the accuracy on 1,000 other pictures of the training
split within half a point. Accuracy and SQNR of the logits are of 2,000 test pictures. TERSOR_BENCH_PART=lenet or resnet
takes one network.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.contract.mixed import Mixed
from app.contract.weight_only import WeightOnly
from benchmarks.distillation import fashion
from benchmarks.harness import table, where
from benchmarks.resnet import resnet, trained
from tests.worker.helpers import context_for, memory_data, tiny_model
from tests.worker.nets import lenet
from worker.data.base import Data
from worker.evaluation.layers import sqnr_db
from worker.techniques.quantization.mixed import layers_of
from worker.techniques.quantization.quantize import QuantizeTechnique

EPOCHS, LEARNED, HELD, TESTED = 3, 6_000, 1_000, 2_000
SAMPLES = 64
SHAPE = (1, 28, 28)  # of what the facts say, which nothing here looks at
DROP = 0.005
NETWORKS = {"lenet": ("LeNet-5", lenet, 1), "resnet": ("ResNet-20, 14 x 14", resnet, 2)}


def main() -> None:
    """The tables."""
    splits = fashion().splits
    every, classes = splits["train"]
    part = os.environ.get("TERSOR_BENCH_PART", "")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for network, make, shrink in (NETWORKS[one] for one in NETWORKS if part in ("", one)):
            images, tested = (nn.functional.avg_pool2d(one, shrink) for one in (every, splits["test"][0][:TESTED]))
            held = images[LEARNED : LEARNED + HELD], classes[LEARNED : LEARNED + HELD]
            judged = tested, splits["test"][1][:TESTED]
            data = memory_data({"calibration": (images[-512:], None), "validation": held, "test": judged})
            torch.manual_seed(0)
            module = trained(make(), images[:LEARNED], classes[:LEARNED], EPOCHS)
            rows += _rounded(network, module, data, Path(name))
    table(["network", "bits", "algorithm", "bytes", "of floats", "accuracy", "SQNR of logits, dB", "seconds"], rows)
    where("torch")


def _rounded(network: str, module: nn.Module, data: Data, folder: Path) -> list[list[str]]:
    """Every way on a copy of the network."""
    exact = _logits(module, data)
    rows = [[network, "float", "", "", "", _accuracy(exact, data), "", ""]]
    print(rows[0], flush=True)
    steps: list[tuple[str, WeightOnly | Mixed]] = []
    shared: dict[str, Any] = {}
    for algorithm in ("rtn", "gptq"):
        shared = {"algorithm": algorithm, "symmetric": True, "group_size": None, "samples": SAMPLES}
        for bits in (4, 3):
            uniform = WeightOnly(bits=bits, **shared)
            size = _bytes(module, data, folder, bits)
            steps += [(f"{bits}", uniform), (f"mixed, bytes of {bits}", Mixed(max_size=size, **shared))]
    steps.append((f"mixed, drop {DROP}", Mixed(max_accuracy_drop=DROP, **shared)))
    for what, step in steps:
        context = context_for(tiny_model(copy.deepcopy(module), shape=SHAPE), data, folder)
        begun = time.perf_counter()
        details = QuantizeTechnique().apply(step, context)
        taken = time.perf_counter() - begun
        found = _logits(context.model.module, data)
        share = details["size"] if isinstance(step, Mixed) else _bytes(module, data, folder, step.bits)
        floats = sum(layer.size.floats for layer in layers_of(Mixed(max_size=0.5), context.model))
        noise = f"{sqnr_db(exact.numpy(), found.numpy()):.1f}"
        size = [f"{round(float(share) * floats):,}", f"{100 * float(share):.2f} %"]
        rows.append([network, what, step.algorithm, *size, _accuracy(found, data), noise, f"{taken:.0f}"])
        print(rows[-1], flush=True)
    return rows


def _bytes(module: nn.Module, data: Data, folder: Path, bits: int) -> float:
    """The share of the floats' bytes that uniform bits take."""
    step = Mixed.model_validate({"max_size": 0.5, "symmetric": True, "bits": [bits], "group_size": None})
    layers = layers_of(step, context_for(tiny_model(module, shape=SHAPE), data, folder).model)
    return sum(layer.size.bits[0] for layer in layers) / sum(layer.size.floats for layer in layers)


def _logits(module: nn.Module, data: Data) -> Tensor:
    inputs = data.splits["test"].read(range(TESTED)).inputs["input"]  # type: ignore[call-overload,index]
    with torch.no_grad():
        return torch.cat([module(part) for part in inputs.split(500)])


def _accuracy(logits: Tensor, data: Data) -> str:
    right = logits.argmax(1) == data.splits["test"].read(range(TESTED)).targets
    return f"{100 * float(right.float().mean()):.2f} %"
