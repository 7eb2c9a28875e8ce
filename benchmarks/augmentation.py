"""Augmentation where labels are few

A convolutional network on 2,000 samples of Fashion-MNIST, from random weights, with the same steps, rate, order of the
samples and seed, with and without changes of the samples: accuracy on the test split, mean of three seeds. Nothing was
chosen on that split. Data as in `distillation`.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.contract.training import Training
from benchmarks.distillation import accuracy, context_of, data_of, fashion, model_of, network
from benchmarks.harness import table, where
from worker.training.loop import train

SEEDS = (0, 1, 2)
FEW = 2_000
COMMON: dict[str, Any] = {"epochs": 60, "optimizer": "adamw", "lr": 3e-3, "schedule": "cosine", "batch_size": 64}
SHIFT = {"crop": {"padding": 2}, "flip": {}}
WAYS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "label_smoothing 0.1": {"label_smoothing": 0.1},
    "crop, flip": {"augmentation": SHIFT},
    "crop, flip, erase": {"augmentation": SHIFT | {"erase": {}}},
    "crop, flip, mixup": {"augmentation": SHIFT | {"mixup": {}}},
    "crop, flip, cutmix": {"augmentation": SHIFT | {"cutmix": {}}},
}


def main() -> None:
    """Prints the table."""
    large = fashion()
    inputs, targets = large.splits["train"]
    few = replace(
        large, splits={**large.splits, "train": (inputs[:FEW], targets[:FEW])}, layers=network((16, 32, 32), 9, 64)
    )
    data = data_of(few)
    scores: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(few, Path(folder))
        for seed in SEEDS:
            for name, way in WAYS.items():
                own = replace(model, module=copy.deepcopy(model.module))
                context = context_of(own, own, data, seed, Path(folder))
                train(context, Training.model_validate(COMMON | way))
                scores[name].append(accuracy(context))
    plain = statistics.mean(scores["as they are"])
    rows = [
        [
            name,
            f"{statistics.mean(found):.2%} ± {statistics.stdev(found):.2%}",
            f"{100 * (statistics.mean(found) - plain):+.2f}",
        ]
        for name, found in scores.items()
    ]
    table(["samples", "accuracy", "points"], rows)
    where("torch")
