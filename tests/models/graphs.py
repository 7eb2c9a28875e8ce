"""ONNX files of other people, from TensorFlow and Paddle; their own runtime is ONNX Runtime on the very bytes."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from app.contract.facts import Task
from app.contract.spec import Quantize
from app.contract.training import Distill, Training
from tests.models import samples
from tests.models.checks import Prepared, Subject
from tests.models.packages import ROOT, module_folder
from worker.data.base import Data, RawBatch

TEACHER = Distill(alpha=1.0, temperature=1.0)
SAMPLES = 8  # that are compared
MAGIKA_BYTES = 1024  # of a file's beginning and of its end
MAGIKA_PADDING = 256


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


def _photos(height: int, width: int) -> Data:
    """float32 [3, height, width] in -1..1: parts of two photos."""
    pictures = samples.crops(width, 24)[:, :, :height].contiguous() / 127.5 - 1
    return samples.dataset("arrays", samples.ListSplit({"x": pictures}), None, 16, 8)


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
    return Subject(
        name=name,
        package=package,
        upload=f"ONNX of {framework}",
        runtime="onnxruntime",
        data=data,
        prepare=functools.partial(_prepare, package, pattern, task),
        training=Training(steps=8, batch_size=8, lr=1e-4, distill=TEACHER),
        quantize=Quantize(method="static"),
        reads=reads,
        scored=False,
    )


def _probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


GRAPHS: tuple[Subject, ...] = (
    _graph("magika 3.3", ("magika", "model.onnx"), "text-classification", _magika_data, "TensorFlow", _probabilities),
    _graph(
        "PP-OCR direction",
        ("rapidocr", "ch_ppocr_mobile_v2.0_cls_mobile.onnx"),
        "image-classification",
        functools.partial(_photos, 48, 192),
        "Paddle",
        _probabilities,
    ),
    _graph(
        "PP-OCRv6 detection",
        ("rapidocr", "PP-OCRv6_det_small.onnx"),
        "regression",
        functools.partial(_photos, 160, 160),
        "Paddle",
    ),
    _graph(
        "PP-OCRv6 recognition",
        ("rapidocr", "PP-OCRv6_rec_small.onnx"),
        "regression",
        functools.partial(_photos, 48, 192),
        "Paddle",
    ),
)
