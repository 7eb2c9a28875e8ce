"""ONNX files of other people, from TensorFlow and Paddle; their own runtime is ONNX Runtime on the very bytes."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from app.contract.distillation import Distill
from app.contract.facts import Task
from app.contract.spec import Quantize
from app.contract.training import Training
from tests.models import samples
from tests.models.checks import Prepared, Subject
from tests.models.packages import ROOT, module_folder
from worker.data.base import Data, RawBatch

TEACHER = Distill(alpha=1.0, temperature=1.0)
SAMPLES = 8  # that are compared
MAGIKA_BYTES = 1024  # of a file's beginning and of its end
MAGIKA_PADDING = 256
SILERO_WINDOW, SILERO_WIDTH = 576, 128  # samples of sound at 16 kHz, numbers of the recurrent state


def _magika_data() -> Data:
    """Files of this repository as magika reads them: int32 [2048], the beginning and the end of each, stripped."""
    files = [path for pattern in ("*.md", "*.toml", "app/*.py", "worker/*.py") for path in sorted(ROOT.glob(pattern))]
    rows = []
    for path in files[:48]:
        content = path.read_bytes()
        begin, end = content.lstrip()[:MAGIKA_BYTES], content.rstrip()[-MAGIKA_BYTES:]
        before, after = [MAGIKA_PADDING] * (MAGIKA_BYTES - len(begin)), [MAGIKA_PADDING] * (MAGIKA_BYTES - len(end))
        rows.append([*begin, *before, *after, *end])
    inputs = torch.tensor(rows, dtype=torch.int32)
    return samples.dataset("arrays", samples.ListSplit({"bytes": inputs}), None, 32, 16)


def _print(height: int, width: int) -> Data:
    """float32 [3, height, width] in -1..1: printed words."""
    pictures = samples.printed(height, width, 24) / 127.5 - 1
    return samples.dataset("arrays", samples.ListSplit({"x": pictures}), None, 16, 8)


def _windows() -> Data:
    """float32 [576]: 36 ms of speech."""
    windows = samples.frames(SILERO_WINDOW, 96)
    return samples.dataset("arrays", samples.ListSplit({"input": windows}), None, 64, 32)


def _silero(prepared: Callable[[onnx.ModelProto], None], folder: Path, data: Data) -> Prepared:
    """The file after `prepared` changed it, and what it says itself of the start of a sound."""
    source = module_folder("silero_vad") / "data" / "silero_vad.onnx"
    taken: RawBatch = data.splits["test"].read(range(SAMPLES))
    assert isinstance(taken.inputs, dict)
    (windows,) = (tensor.numpy() for tensor in taken.inputs.values())
    session = onnxruntime.InferenceSession(str(source))
    state = np.zeros((2, len(windows), SILERO_WIDTH), np.float32)
    expected = session.run(None, {"input": windows, "state": state, "sr": np.array(samples.RATE)})[0]
    proto = onnx.load(source)
    prepared(proto)
    onnx.save_model(proto, str(folder / "model.onnx"))
    return Prepared(folder / "model.onnx", {"task": "multi-label"}, taken, expected)


def _unchanged(proto: onnx.ModelProto) -> None:
    """As it comes."""


def _at_the_start(proto: onnx.ModelProto) -> None:
    """Fixes the recurrent state at zeros and the rate at 16 kHz, and gives the probability alone, in place."""
    graph = proto.graph
    constants = {"sr": samples.RATE, "first": [0], "pair": [2], "width": [SILERO_WIDTH]}
    graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in constants.items())
    zeros = [
        helper.make_node("Shape", ["input"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "first"], ["samples"], axis=0),
        helper.make_node("Concat", ["pair", "samples", "width"], ["state_shape"], axis=0),
        helper.make_node("ConstantOfShape", ["state_shape"], ["state"]),
    ]
    nodes = [*zeros, *graph.node]
    del graph.node[:], graph.input[:], graph.output[1:]
    graph.node.extend(nodes)
    window = helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", SILERO_WINDOW])
    graph.input.append(window)


def _prepare(package: str, pattern: str, task: Task, folder: Path, data: Data) -> Prepared:
    """The file as it is, and what it gives for the first test samples."""
    (source,) = module_folder(package).rglob(pattern)
    path = Path(shutil.copy(source, folder / "model.onnx"))
    taken: RawBatch = data.splits["test"].read(range(SAMPLES))
    assert isinstance(taken.inputs, dict)
    session = onnxruntime.InferenceSession(str(path))
    expected = session.run(None, {name: tensor.numpy() for name, tensor in taken.inputs.items()})[0]
    return Prepared(path, {"task": task}, taken, expected)


def _graph(
    name: str,
    where: tuple[str, str],
    task: Task,
    data: Callable[[], Data],
    framework: str,
    reads: Callable[[Tensor], Tensor] = torch.Tensor.detach,
) -> Subject:
    package, pattern = where
    prepare = functools.partial(_prepare, package, pattern, task)
    return _subject(name, package, f"ONNX of {framework}", data, prepare, reads)


def _subject(
    name: str,
    package: str,
    upload: str,
    data: Callable[[], Data],
    prepare: Callable[[Path, Data], Prepared],
    reads: Callable[[Tensor], Tensor] = torch.Tensor.detach,
) -> Subject:
    return Subject(
        name=name,
        package=package,
        upload=upload,
        runtime="onnxruntime",
        data=data,
        prepare=prepare,
        training=Training(steps=8, batch_size=8, lr=1e-4, distill=TEACHER),
        quantize=Quantize(method="static"),
        reads=reads,
        scored=False,
    )


def _probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


GRAPHS: tuple[Subject, ...] = (
    _subject("Silero VAD, as ONNX", "silero-vad", "ONNX", _windows, functools.partial(_silero, _unchanged)),
    _subject(
        "Silero VAD, stateless",
        "silero-vad",
        "ONNX, its state fixed at zeros and its rate at 16 kHz",
        _windows,
        functools.partial(_silero, _at_the_start),
    ),
    _graph("magika 3.3", ("magika", "model.onnx"), "text-classification", _magika_data, "TensorFlow", _probabilities),
    _graph(
        "PP-OCR direction",
        ("rapidocr", "ch_ppocr_mobile_v2.0_cls_mobile.onnx"),
        "image-classification",
        functools.partial(_print, 48, 192),
        "Paddle",
        _probabilities,
    ),
    _graph(
        "PP-OCRv6 detection",
        ("rapidocr", "PP-OCRv6_det_small.onnx"),
        "regression",
        functools.partial(_print, 160, 160),
        "Paddle",
    ),
    _graph(
        "PP-OCRv6 recognition",
        ("rapidocr", "PP-OCRv6_rec_small.onnx"),
        "regression",
        functools.partial(_print, 48, 192),
        "Paddle",
    ),
)
