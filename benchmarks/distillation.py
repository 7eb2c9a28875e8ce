"""A distilled student against the same student trained alone

Teachers are convolutional networks, trained here on Fashion-MNIST and on spoken digits; students are what `distill`
with `{"kind": "auto", "parameters": …}` makes of them. Alone and distilled, a student has the same start, steps, rate,
order of the samples and seed; accuracies are on the test split, a mean over three seeds. Fashion-MNIST comes with
Debian's `dataset-fashion-mnist`, the digits lie as `free-spoken-digits.tar` in the folder that TERSOR_TEST_DATA names.
"""

from __future__ import annotations

import copy
import gzip
import io
import os
import statistics
import tarfile
import tempfile
import wave
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from app.contract.architecture import Architecture
from app.contract.distillation import ArchitectureStudent, AttentionMaps, AutoStudent, Distill, SoftTargets
from app.contract.facts import DatasetFacts, SplitFacts, TensorFacts
from app.contract.training import Training
from benchmarks.harness import table, where
from benchmarks.training import InMemory
from worker.context import Context
from worker.data.base import Data, Split
from worker.data.feed import Feed
from worker.loading import load_model
from worker.loading.architecture import ArchitecturePlan
from worker.loading.layers import build
from worker.model import Model
from worker.students.students import student_of
from worker.training.loop import train

SEEDS = (0, 1, 2)
FASHION = Path("/usr/share/datasets/fashion-mnist")
DIGITS = "free-spoken-digits.tar"
FEW = 6_000  # samples that a student learns from where the teacher had 60,000
SOFT = Distill(temperature=4.0, alpha=0.9)
# Chosen, as the number of epochs, on a part of the training data that no student saw.
WITH_MAPS = Distill(temperature=4.0, alpha=0.9, losses=(SoftTargets(), AttentionMaps()))
# A spectrogram of a spoken digit: windows of 32 ms every 16 ms at 8 kHz, one second, 64 bands.
WINDOW, HOP, FRAMES, BANDS = 256, 128, 64, 64


@dataclass(frozen=True)
class Case:
    """A data set, a teacher and how both are trained."""

    name: str
    splits: Mapping[str, tuple[Tensor, Tensor]]
    layers: list[dict[str, Any]]
    teaching: Training
    learning: Training
    share: float
    distill: Distill
    samples: int | None = None
    """Of the training split, those that a student learns from; all of them unless given."""


def network(channels: tuple[int, int, int], flat: int, hidden: int) -> list[dict[str, Any]]:
    """Three convolutions with batch norms, each halving the map, and two dense layers."""
    layers: list[dict[str, Any]] = []
    before = 1
    for after in channels:
        layers += [
            {"type": "Conv2d", "in_channels": before, "out_channels": after, "kernel_size": 3, "padding": 1},
            {"type": "BatchNorm2d", "num_features": after},
            {"type": "ReLU"},
            {"type": "MaxPool2d", "kernel_size": 2},
        ]
        before = after
    dense = [(flat * before, hidden), (hidden, 10)]
    first, last = ({"type": "Linear", "in_features": a, "out_features": b} for a, b in dense)
    return [*layers, {"type": "Flatten"}, first, {"type": "ReLU"}, last]


def fashion() -> Case:
    """60,000 and 10,000 pictures of 28 x 28 in [0, 1]."""
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _idx(FASHION / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
        labels = _idx(FASHION / f"{prefix}-labels-idx1-ubyte.gz", 8)
        splits[split] = torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()
    teaching = Training(epochs=6, lr=2e-3, schedule="one_cycle", batch_size=128)
    learning = Training(epochs=15, lr=2e-3, schedule="one_cycle", batch_size=128)
    return Case("Fashion-MNIST", splits, network((32, 64, 64), 9, 128), teaching, learning, 0.1, SOFT)


def fashion_of_few() -> Case:
    """The same teacher, and students that see a tenth of its samples."""
    case = fashion()
    learning = case.learning.model_copy(update={"epochs": 20})
    return replace(case, name=f"Fashion-MNIST, {FEW:,} samples", learning=learning, samples=FEW)


def spoken() -> Case:
    """2,700 and 300 log spectrograms of spoken digits, the recordings 0 to 4 of each speaker and digit for the test."""
    found: dict[str, tuple[list[Tensor], list[int]]] = {"train": ([], []), "test": ([], [])}
    with tarfile.open(_digits()) as archive:
        for member in sorted(archive.getmembers(), key=lambda one: one.name):
            if not member.name.endswith(".wav"):
                continue
            digit, _, index = Path(member.name).stem.split("_")
            sounds, labels = found["test" if int(index) < 5 else "train"]
            content = archive.extractfile(member)
            assert content is not None
            sounds.append(_spectrogram(content.read()))
            labels.append(int(digit))
    splits = {name: (torch.stack(sounds), torch.tensor(labels)) for name, (sounds, labels) in found.items()}
    teaching = Training(epochs=30, lr=2e-3, schedule="one_cycle", batch_size=64)
    learning = Training(epochs=25, lr=2e-3, schedule="one_cycle", batch_size=64)
    return Case("spoken digits", splits, network((32, 64, 64), 64, 64), teaching, learning, 0.05, WITH_MAPS)


def model_of(case: Case, folder: Path) -> Model:
    """The teacher as an upload is loaded, with random weights."""
    inputs = case.splits["train"][0]
    spec = {
        "task": "image-classification" if inputs.is_floating_point() else "text-classification",
        "architecture": {"layers": case.layers},
        "input": {"shape": list(inputs.shape[1:]), "dtype": _dtype(inputs)},
    }
    path = folder / "teacher.safetensors"
    torch.manual_seed(0)
    layers = Architecture.model_validate({"layers": case.layers}).layers
    save_file(build(layers).state_dict(), path)
    return load_model(path, path.name, spec, folder)


def data_of(case: Case) -> Data:
    """The splits in memory."""
    inputs = case.splits["train"][0]
    tensor = TensorFacts.model_validate({"name": "input", "shape": inputs.shape[1:], "dtype": _dtype(inputs)})
    facts = {
        name: SplitFacts(samples=len(x), inputs=(tensor,), targets="classes") for name, (x, _) in case.splits.items()
    }
    held: dict[str, Split] = {name: InMemory(*pair) for name, pair in case.splits.items()}  # type: ignore[dict-item]
    return Data(DatasetFacts(kind="arrays", splits=facts), held)


def context_of(model: Model, teacher: Model, data: Data, seed: int, folder: Path) -> Context:
    """A job of one model and its teacher."""
    return Context(
        model=model,
        teacher=teacher.module,
        feed=Feed(model, data),
        device=torch.device("cpu"),
        seed=seed,
        scratch=folder,
        progress=lambda share: None,
    )


def accuracy(context: Context) -> float:
    """On the test split."""
    assert context.feed is not None
    return context.feed.score(lambda inputs: context.model.module(*inputs), "test")[0]


def learned(student: Model, teacher: Model, data: Data, case: Case, seed: int, distill: Distill | None) -> float:
    """The accuracy of a student after its training."""
    with tempfile.TemporaryDirectory() as name:
        own = replace(student, module=copy.deepcopy(student.module))
        context = context_of(own, teacher, data, seed, Path(name))
        train(context, case.learning.model_copy(update={"distill": distill}))
        return accuracy(context)


def run(case: Case, folder: Path) -> list[list[str]]:
    """The table's rows of one data set."""
    data = data_of(case)
    teacher = model_of(case, folder)
    train(context_of(teacher, teacher, data, 0, folder), case.teaching)
    teacher.module.requires_grad_(False)
    best = accuracy(context_of(teacher, teacher, data, 0, folder))
    if case.samples is not None:
        inputs, targets = case.splits["train"]
        few = inputs[: case.samples], targets[: case.samples]
        data = data_of(replace(case, splits={**case.splits, "train": few}))
    found: dict[tuple[str, bool], list[float]] = {}
    for seed in SEEDS:
        context = context_of(teacher, teacher, data, seed, folder)
        started = student_of(context, AutoStudent(kind="auto", parameters=case.share), 1).model
        assert isinstance(started.plan, ArchitecturePlan)
        described = ArchitectureStudent(kind="architecture", architecture=started.plan.spec.architecture)
        students = {"random weights": student_of(context, described, 1).model, "the teacher's weights": started}
        for start, student in students.items():
            for distill in (None, case.distill):
                result = learned(student, teacher, data, case, seed, distill)
                found.setdefault((start, distill is not None), []).append(result)
                print(f"<!-- {case.name}, {start}, distilled {distill is not None}, seed {seed}: {result:.4f} -->")
    size = f"{started.facts.parameters:,} of {teacher.facts.parameters:,}"
    return [
        [case.name, f"{best:.2%}", size, start, _shown(found[start, False]), _shown(found[start, True])]
        for start in ("random weights", "the teacher's weights")
    ]


def main() -> None:
    """Prints the table."""
    rows = []
    for case in (fashion(), fashion_of_few(), spoken()):
        with tempfile.TemporaryDirectory() as name:
            rows += run(case, Path(name))
    table(["data", "teacher", "student's parameters", "start", "alone", "distilled"], rows)
    where("torch")


def _dtype(inputs: Tensor) -> str:
    return str(inputs.dtype).removeprefix("torch.")


def _shown(values: list[float]) -> str:
    return f"{statistics.mean(values):.2%} ± {statistics.stdev(values):.2%}"


def _idx(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header).copy()


def _digits() -> Path:
    folders = [os.environ.get("TERSOR_TEST_DATA", ""), str(Path(__file__).parents[2] / "shared" / "data")]
    found = [Path(folder) / DIGITS for folder in folders if folder and (Path(folder) / DIGITS).exists()]
    if not found:
        raise SystemExit(f"{DIGITS} is in neither TERSOR_TEST_DATA nor ../shared/data")
    return found[0]


def _spectrogram(content: bytes) -> Tensor:
    """[1, bands, frames]: the logarithm of the power, standardized, cut or padded to a second."""
    with wave.open(io.BytesIO(content)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    sound = torch.zeros(HOP * FRAMES)
    kept = torch.from_numpy(samples[: len(sound)])
    sound[: len(kept)] = kept
    power = torch.stft(sound, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs().square()
    bands = power[1:, :FRAMES].unflatten(0, (BANDS, -1)).mean(1)
    levels = (bands + 1e-6).log()
    return ((levels - levels.mean()) / levels.std())[None]
