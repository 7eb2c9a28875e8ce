"""Settings that find themselves against a grid of 24

Two optimizers, four rates, three batch sizes, each trained in full, against `"auto"` for all three with its default
budget: the accuracy on the test split, a mean over three seeds, and the time of search and training in trainings of the
grid. Neither the grid's best, which is chosen on the test split here, nor `auto` has seen that split in its training;
`auto` judges on a tenth of the training samples, which its last training sees again. Data as in `distillation`.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.contract.errors import TrainingDiverged
from app.contract.training import Training
from benchmarks.distillation import Case, accuracy, context_of, data_of, fashion, model_of, network, spoken
from benchmarks.harness import seconds, table, where
from benchmarks.mails import VOCABULARY, mails
from worker.data.base import Data
from worker.model import Model
from worker.training.finding.settle import settle
from worker.training.loop import train

SEEDS = (0, 1, 2)
GRID = tuple(itertools.product(("adamw", "sgd"), (1e-4, 1e-3, 1e-2, 1e-1), (32, 128, 512)))
FEW = 6_000
AIM, COST = 0.003, 0.20


def recurrent() -> list[dict[str, Any]]:
    """An LSTM over words, whose last state says what a mail is."""
    return [
        {"type": "Embedding", "num_embeddings": VOCABULARY, "embedding_dim": 32},
        {"type": "LSTM", "input_size": 32, "hidden_size": 32, "output": "last"},
        {"type": "Linear", "in_features": 32, "out_features": 2},
    ]


def cases() -> list[tuple[Case, int]]:
    """Data sets with the epochs of a training; of the larger one, a tenth of the samples."""
    large = fashion()
    inputs, targets = large.splits["train"]
    splits = {**large.splits, "train": (inputs[:FEW], targets[:FEW])}
    layers = network((16, 32, 32), 9, 64)
    few = replace(large, name=f"Fashion-MNIST, {FEW:,} samples", splits=splits, layers=layers)
    digits = replace(spoken(), layers=network((16, 32, 32), 64, 32))
    return [(few, 5), (digits, 8), (replace(few, name="spam mails, LSTM", splits=mails(), layers=recurrent()), 6)]


def trained(model: Model, data: Data, seed: int, training: Training) -> float:
    """The accuracy after a training, with whatever has to be found for it; 0 where it diverged."""
    own = replace(model, module=copy.deepcopy(model.module))
    with tempfile.TemporaryDirectory() as folder:
        context = context_of(own, own, data, seed, Path(folder))
        settled, found = settle(context, training)
        if found:
            print(f"<!-- found {settled.optimizer}, {settled.lr:.3g}, {settled.batch_size} -->", file=sys.stderr)
        try:
            train(context, settled)
        except TrainingDiverged:
            return 0.0
        return accuracy(context)


def row(case: Case, epochs: int) -> list[str]:
    """The table's row of one data set."""
    data = data_of(case)
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(case, Path(folder))
    common = {"epochs": epochs, "schedule": "cosine"}
    scores: dict[tuple[str, float, int], list[float]] = {}
    auto: list[float] = []
    spent = {"grid": 0.0, "auto": 0.0}
    for seed in SEEDS:  # in turns: whatever slows the machine slows both
        for optimizer, lr, size in GRID:
            training = Training.model_validate(common | {"optimizer": optimizer, "lr": lr, "batch_size": size})
            results = scores.setdefault((optimizer, lr, size), [])
            spent["grid"] += seconds(lambda: results.append(trained(model, data, seed, training)))  # noqa: B023
        asked = Training.model_validate(common | dict.fromkeys(("optimizer", "lr", "batch_size"), "auto"))
        spent["auto"] += seconds(lambda: auto.append(trained(model, data, seed, asked)))  # noqa: B023
    best, accuracies = max(scores.items(), key=lambda item: statistics.mean(item[1]))
    middle = statistics.median(statistics.mean(results) for results in scores.values())
    gap = statistics.mean(auto) - statistics.mean(accuracies)
    return [
        case.name,
        f"{statistics.mean(accuracies):.2%} ({best[0]}, {best[1]:g}, {best[2]})",
        f"{middle:.2%}",
        f"{statistics.mean(auto):.2%}",
        f"{100 * gap:+.2f}",
        f"{spent['auto'] / spent['grid']:.1%}",
    ]


def main() -> None:
    """Prints the table."""
    rows = [row(case, epochs) for case, epochs in cases()]
    columns = ["data", "best of the grid", "median of the grid", "auto"]
    table([*columns, f"points (aim >= {-100 * AIM:.1f})", f"cost in grids (aim <= {COST:.0%})"], rows)
    where("torch", "optuna")
