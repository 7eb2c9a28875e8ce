"""Training in two processes against one

The same steps on the same batches, in turns within one run: a loop written by hand on one and on two threads, Tersor's
in one process on one and on two threads, and in two processes of one thread each, which sum their gradients: of one
host, and, in a second run, of two that both are this one. Tersor's check of its masks, losses and weights is in all of
its figures.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
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


def measured(ranks: Ranks, hosts: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each way by network, in the first process; the other one helps."""
    arrays = mnist()
    inputs, targets = torch.from_numpy(arrays["train_inputs"]), torch.from_numpy(arrays["train_targets"])
    found: dict[str, dict[str, list[float]]] = {}
    for name, (make, size, steps) in CASES.items():
        torch.manual_seed(0)
        own, plain = context(make(), inputs, targets), make()
        for number in range(ROUNDS + 1):  # the first round pays for allocations
            for way, taken in _round(ranks, hosts, own, plain, inputs, targets, size, steps).items():
                if number:
                    found.setdefault(name, {}).setdefault(way, []).append(taken)
    return found


def _round(
    ranks: Ranks,
    hosts: int,
    own: Context,
    plain: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    size: int,
    steps: int,
) -> dict[str, float]:
    """Seconds by way; over two hosts only of that and of what it is held against."""
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
    for threads, label in THREADS.items() if hosts == 1 else ():
        taken[f"by hand, {label}"] = ranks.told(lambda: alone(threads, hand))  # noqa: B023
        taken[f"Tersor, {label}"] = ranks.told(lambda: alone(threads, tersor))  # noqa: B023
    if hosts > 1:
        taken[ONE] = ranks.told(lambda: alone(1, tersor))
    torch.set_num_threads(ranks.beside)  # of which each process takes one
    own.ranks = ranks
    together = training.model_copy(update={"processes": 2 // hosts, "hosts": hosts})
    taken[f"Tersor, 2 {'processes' if hosts == 1 else 'hosts'}, 1 thread each"] = seconds(lambda: train(own, together))
    return taken


def crewed(hosts: int, folder: Path, host: int = 0) -> dict[str, dict[str, list[float]]]:
    """What is measured by two processes."""

    def follow(ranks: Ranks) -> None:
        measured(ranks, hosts)

    def problem_of(error: Exception) -> Problem:
        return JobFailed(str(error)).problem()

    with crew(Place(2 // hosts, folder, host, hosts), follow, problem_of) as ranks:
        return measured(ranks, hosts)


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        other = os.fork()
        if not other:
            crewed(2, Path(folder), 1)
            os._exit(0)
        apart = crewed(2, Path(folder))
        os.waitpid(other, 0)
    dist.destroy_process_group()
    with tempfile.TemporaryDirectory() as folder:
        found = crewed(1, Path(folder))
    rows = []
    for name, (_, size, steps) in CASES.items():
        (one, base), (over, taken) = apart[name].items()
        ways = [(way, own, found[name][ONE]) for way, own in found[name].items()] + [(over, taken, base)]
        rows += [
            [name, way, f"{size * steps / statistics.median(own):,.0f}", f"{ratio(against, own):.2f}"]
            for way, own, against in ways
        ]
        assert one == ONE
    table(["network", "way", "samples/s, median", f"ratio to {ONE}"], rows)
    where("torch", "mlxtend")
