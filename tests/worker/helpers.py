"""Small real models and real data: what the worker's tests run on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from app.contract.facts import DatasetFacts, LayerFacts, ModelFacts, SplitFacts, TensorFacts
from worker.context import Context
from worker.data.base import Data, RawBatch, Split
from worker.data.batch import Batch, Inputs
from worker.data.feed import Feed
from worker.model import Model
from worker.objectives.base import Forward, Task, scores
from worker.objectives.classification import Classification

CLASSES = 10
SPLITS = {"train": 1000, "validation": 250, "test": 447, "calibration": 100}  # of the 1,797 digits


def tiny_model(module: nn.Module, *, shape: tuple[int, ...] = (64,), classes: int = CLASSES) -> Model:
    """A Model around a module with one float32 input `input` [batch, *shape]; saves as safetensors."""
    layers = tuple(
        LayerFacts(
            name=name.removesuffix(".weight"),
            type=type(module.get_submodule(name.rpartition(".")[0])).__name__,
            shape=tuple(weight.shape),
            parameters=weight.numel(),
        )
        for name, weight in module.named_parameters()
        if name.endswith("weight")
    )
    facts = ModelFacts(
        format="architecture",
        task="image-classification",
        accepts=("arrays",),
        inputs=(TensorFacts(name="input", shape=shape, dtype="float32"),),
        classes=classes,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        layers=layers,
    )
    return Model(module, facts, _encode, _save, Classification())


def mlp(*, seed: int = 0, norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    """64 -> 64 -> 32 -> 10: 6,464 weights and 106 biases."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(64, 64)]
    layers += [nn.BatchNorm1d(64)] if norm else []
    layers += [nn.ReLU()]
    layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def convnet(*, seed: int = 0) -> nn.Sequential:
    """A small convolutional net for digits [batch, 1, 8, 8], with BatchNorm and global pooling."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


class MemorySplit:
    """A split held in memory."""

    def __init__(self, inputs: Tensor, targets: Tensor | None) -> None:
        self.inputs = inputs
        self.targets = targets
        self.has_targets = targets is not None

    def __len__(self) -> int:
        return len(self.inputs)

    def classes(self) -> NDArray[np.int64] | None:
        return None if self.targets is None else self.targets.numpy()

    def read(self, indices: Sequence[int]) -> RawBatch:
        chosen = list(indices)
        return RawBatch({"input": self.inputs[chosen]}, None if self.targets is None else self.targets[chosen])


def memory_data(splits: dict[str, tuple[Tensor, Tensor | None]]) -> Data:
    """A dataset of arrays: split -> float32 inputs [n, *shape] and int64 targets [n] or None."""
    facts = {
        name: SplitFacts(
            samples=len(inputs),
            inputs=(TensorFacts(name="input", shape=tuple(inputs.shape[1:]), dtype="float32"),),
            targets=None if targets is None else "classes",
            target_min=None if targets is None else int(targets.min()),
            target_max=None if targets is None else int(targets.max()),
        )
        for name, (inputs, targets) in splits.items()
    }
    held: dict[str, Split] = {name: MemorySplit(inputs, targets) for name, (inputs, targets) in splits.items()}
    return Data(DatasetFacts(kind="arrays", splits=facts), held)


def part_of(data: Data, sizes: dict[str, int]) -> Data:
    """The first samples of some splits that lie in memory."""
    splits: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, size in sizes.items():
        split = data.splits[name]
        assert isinstance(split, MemorySplit)
        splits[name] = (split.inputs[:size], None if split.targets is None else split.targets[:size])
    return memory_data(splits)


def digits_data(shape: tuple[int, ...] = (64,)) -> Data:
    """The 1,797 real 8x8 digits of scikit-learn in [0, 1], in a fixed random order; `calibration` has no targets."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(images, dtype=torch.float32)[order].div(16).reshape(-1, *shape)
    targets = torch.tensor(labels, dtype=torch.int64)[order]
    parts = zip(SPLITS, inputs.split(list(SPLITS.values())), targets.split(list(SPLITS.values())), strict=True)
    return memory_data({name: (x.clone(), None if name == "calibration" else y.clone()) for name, x, y in parts})


def context_for(
    model: Model, data: Data | None, scratch: Path, *, teacher: nn.Module | None = None, seed: int = 0
) -> Context:
    """A context on the CPU; without a teacher, a copy of the model as it is now."""
    return Context(
        model=model,
        teacher=(teacher if teacher is not None else copy.deepcopy(model.module)).eval(),
        feed=None if data is None else Feed(model, data),
        device=torch.device("cpu"),
        seed=seed,
        scratch=scratch,
        progress=lambda share: None,
    )


def score(task: Task, forward: Forward, batches: Iterable[Batch]) -> tuple[float, int]:
    """What the task is judged by, and on how many samples."""
    found = scores(task, forward, batches)
    return found.value, found.samples


def _encode(raw: RawBatch) -> Inputs:
    assert isinstance(raw.inputs, dict)
    return (raw.inputs["input"],)


def _save(module: nn.Module, folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file(module.state_dict(), path)
    return path
