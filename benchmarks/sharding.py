"""Shared-out weights against whole ones, in two processes

A transformer of 85 million parameters over the rows of MNIST digits, Adam, batches of 16 in two processes of one thread
each: the most memory that a process took beyond what it had before the training, and samples a second. Each way in
processes of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from app.contract.errors import JobFailed, Problem
from app.contract.training import Training
from benchmarks.harness import seconds, table, where
from benchmarks.training import context
from worker.demo.train_lenet import mnist
from worker.ranks.crew import crew
from worker.ranks.meeting import Place
from worker.ranks.ranks import Ranks
from worker.training.loop import train

WIDTH, LAYERS, SIZE, STEPS = 768, 12, 16, 6
WAYS = {"whole weights in each process": False, "sharded": True}


class Rows(nn.Module):
    """An encoder over the rows of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(28, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        """[batch, 1, 28, 28] -> [batch, 10]."""
        hidden = self.rows(pictures[:, 0])
        for layer in self.layers:
            hidden = layer(hidden)
        classes: Tensor = self.head(hidden.mean(1))
        return classes


def measured(ranks: Ranks, sharded: bool) -> tuple[int, float]:
    """Bytes and seconds of a training, in this process."""
    torch.set_num_threads(2)  # of which each takes one
    arrays = mnist()
    torch.manual_seed(0)
    own = context(Rows(), torch.from_numpy(arrays["train_inputs"]), torch.from_numpy(arrays["train_targets"]))
    own.ranks = ranks
    training = Training(steps=STEPS, batch_size=SIZE, divergence_retries=0, processes=2, sharded=sharded)
    before = psutil.Process().memory_info().rss
    taken = seconds(lambda: train(own, training))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before, taken


def _one_way(sharded: bool, said: Path) -> None:
    def follow(ranks: Ranks) -> None:
        ranks.listed(measured(ranks, sharded))

    def problem_of(error: Exception) -> Problem:
        return JobFailed(str(error)).problem()

    with tempfile.TemporaryDirectory() as folder, crew(Place(2, Path(folder)), follow, problem_of) as ranks:
        said.write_text(json.dumps(ranks.listed(measured(ranks, sharded))))


def main() -> None:
    """Prints the table."""
    rows = []
    for name, sharded in WAYS.items():
        with tempfile.NamedTemporaryFile() as said:
            process = multiprocessing.get_context("fork").Process(target=_one_way, args=(sharded, Path(said.name)))
            process.start()
            process.join()
            found = json.loads(Path(said.name).read_text())
        most = max(held for held, _ in found)
        rows.append([name, f"{most >> 20:,} MiB", f"{STEPS * SIZE / found[0][1]:,.1f}"])
    print(f"{sum(weight.numel() for weight in Rows().parameters()):,} parameters\n")
    table(["way", "memory of a process", "samples/s"], rows)
    where("torch", "mlxtend")
