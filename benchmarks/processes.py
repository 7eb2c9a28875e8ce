"""Training in two processes against one

The same steps on the same batches, in turns within one run: a loop written by hand on one and on two threads, Tersor's
in one process on one and on two threads, and in two processes of one thread each, which sum their gradients. Tersor's
check of its masks, losses and weights is in all of its figures.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from app.contract.errors import JobFailed, Problem
from app.contract.training import Training
from benchmarks.harness import ratio, seconds, table, where
from benchmarks.resnet import resnet
from benchmarks.training import context
from worker.context import Context
from worker.demo.train_lenet import lenet, mnist
from worker.ranks.crew import crew
from worker.ranks.meeting import Place
from worker.ranks.ranks import Ranks
from worker.training.loop import train

ROUNDS = 7
THREADS = {1: "1 thread", 2: "2 threads"}
ONE = f"Tersor, {THREADS[1]}"


CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "LeNet-5, batches of 64": (lenet, 64, 40),
    "LeNet-5, batches of 512": (lenet, 512, 8),
    "ResNet-20, batches of 64": (resnet, 64, 12),
    "ResNet-20, batches of 256": (resnet, 256, 4),
}


def by_hand(module: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, size: int, steps: int) -> None:
    """The loop of a tutorial."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    module.train()
    for chosen in torch.randperm(len(inputs)).split(size)[:steps]:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(inputs[chosen]), targets[chosen])
        loss.backward()
        optimizer.step()


def measured(ranks: Ranks) -> dict[str, dict[str, list[float]]]:
    """Seconds of each way by network, in the first process; the other one helps."""
    arrays = mnist()
    inputs, targets = torch.from_numpy(arrays["train_inputs"]), torch.from_numpy(arrays["train_targets"])
    found: dict[str, dict[str, list[float]]] = {}
    for name, (make, size, steps) in CASES.items():
        torch.manual_seed(0)
        own, plain = context(make(), inputs, targets), make()
        for number in range(ROUNDS + 1):  # the first round pays for allocations
            for way, taken in _round(ranks, own, plain, inputs, targets, size, steps).items():
                if number:
                    found.setdefault(name, {}).setdefault(way, []).append(taken)
    return found


def _round(
    ranks: Ranks, own: Context, plain: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, size: int, steps: int
) -> dict[str, float]:
    training = Training(steps=steps, batch_size=size, divergence_retries=0)

    def alone(threads: int, work: Callable[[], object]) -> float:
        torch.set_num_threads(threads)
        return seconds(work)

    def hand() -> None:
        by_hand(plain, inputs, targets, size, steps)

    def tersor() -> None:
        own.ranks = Ranks()
        train(own, training)

    taken = {}
    for threads, label in THREADS.items():
        taken[f"by hand, {label}"] = ranks.told(lambda: alone(threads, hand))  # noqa: B023
        taken[f"Tersor, {label}"] = ranks.told(lambda: alone(threads, tersor))  # noqa: B023
    torch.set_num_threads(2)  # of which each of two processes takes one
    own.ranks = ranks
    taken["Tersor, 2 processes, 1 thread each"] = seconds(
        lambda: train(own, training.model_copy(update={"processes": 2}))
    )
    return taken


def main() -> None:
    """Prints the table."""

    def follow(ranks: Ranks) -> None:
        measured(ranks)

    def problem_of(error: Exception) -> Problem:
        return JobFailed(str(error)).problem()

    with tempfile.TemporaryDirectory() as folder, crew(Place(2, Path(folder)), follow, problem_of) as ranks:
        found = measured(ranks)
    rows = [
        [name, way, f"{size * steps / statistics.median(taken):,.0f}", f"{ratio(ways[ONE], taken):.2f}"]
        for (name, ways), (_, size, steps) in zip(found.items(), CASES.values(), strict=True)
        for way, taken in ways.items()
    ]
    table(["network", "way", "samples/s, median", f"ratio to {ONE}"], rows)
    where("torch", "mlxtend")
