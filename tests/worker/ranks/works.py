"""What the processes of the tests do: importable, since they are other processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from app.contract.errors import InvalidSpec, JobFailed, Problem, TersorError
from app.contract.spec import Step
from app.contract.training import Training
from tests.worker.helpers import MemorySplit, context_for, convnet, digits_data, mlp, part_of, tiny_model
from worker.constraints import baked, impose_mask
from worker.data.batch import Batch
from worker.data.feed import Feed
from worker.objectives.classification import Classification
from worker.objectives.embedding import SentenceEmbedding
from worker.objectives.values import Regression
from worker.ranks.batch_norm import normalized
from worker.ranks.crew import crew
from worker.ranks.meeting import Place
from worker.ranks.ranks import Ranks
from worker.ranks.sharded import Shards, local
from worker.ranks.state import check_same
from worker.techniques.base import Details
from worker.techniques.registry import TECHNIQUES
from worker.training.loop import train

SPLITS = {"train": 333, "validation": 101}


class PartlyUsed(nn.Module):
    """Some of its weights never see a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = mlp(), nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.used(inputs)
        return outputs


class Stacked(nn.Module):
    """Blocks in a list, as transformers have them, with one weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(64, 32)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True) for _ in range(3)
        )
        self.after = nn.Linear(32, 64)
        self.after.weight = nn.Parameter(self.before.weight.detach().T.clone())
        self.head = nn.Linear(32, 10)
        self.same = nn.Linear(32, 10)
        self.same.weight = self.head.weight

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.before(inputs)[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        outputs: Tensor = self.head(hidden[:, 0]) + self.same(hidden[:, 0])
        return outputs


NETS: dict[str, Callable[[], nn.Module]] = {
    "stacked": Stacked,
    "mlp": mlp,
    "mlp with BatchNorm": lambda: mlp(norm=True),
    "convnet": convnet,
    "partly used": PartlyUsed,
}


class Noisy(Classification):
    """Changes its inputs at random."""

    def prepare(self, batch: Batch, random: torch.Generator) -> Batch:
        noise = torch.randn(batch.inputs[0].shape, generator=random)
        return replace(batch, inputs=(batch.inputs[0] + 0.1 * noise,), indices=None)


@dataclass(frozen=True)
class Case:
    """A training. `mask_at`: the step before which half of the first layer's weights go."""

    net: str
    fields: dict[str, Any]
    mask_at: int | None = None
    noisy: bool = False
    sharded: bool = False
    masked: bool = False


@dataclass(frozen=True)
class Outcome:
    """The loss of every step, the state that comes out, and the report."""

    losses: list[float]
    state: dict[str, Tensor]
    details: Details


def trainings(ranks: Ranks, scratch: Path, cases: dict[str, Case]) -> dict[str, Outcome]:
    return {name: training(ranks, scratch / name, case) for name, case in cases.items()}


def training(ranks: Ranks, scratch: Path, case: Case) -> Outcome:
    scratch.mkdir(parents=True, exist_ok=True)
    shape = (1, 8, 8) if case.net == "convnet" else (64,)
    model = tiny_model(NETS[case.net](), shape=shape)
    if case.noisy:
        model = replace(model, task=Noisy())
    context = context_for(model, part_of(digits_data(shape), SPLITS), scratch)
    context.ranks = ranks
    module = context.model.module

    def on_step(step: int, total: int) -> bool:
        if step == case.mask_at:
            impose_half(module)
        return True

    if case.masked:
        impose_half(module)
    losses: list[float] = []
    sharded = case.sharded and ranks.size > 1
    asked = Training(processes=ranks.size, sharded=sharded, **case.fields)
    summary = train(context, asked, None if case.mask_at is None else on_step, on_loss=losses.append)
    return Outcome(losses, baked(module).state_dict(), summary.details())


def impose_half(module: nn.Module) -> None:
    """Takes half of the first layer's weights away."""
    name, weight = next(iter(module.named_parameters()))
    impose_mask(module, name, torch.arange(weight.numel()).reshape(weight.shape) % 2 == 0)


def technique(ranks: Ranks, scratch: Path, step: Step) -> tuple[Details, dict[str, Tensor]]:
    """What a technique reports, and the state that comes out of it."""
    scratch.mkdir(parents=True, exist_ok=True)
    context = context_for(tiny_model(mlp(norm=True)), part_of(digits_data(), {"train": 300, "validation": 60}), scratch)
    context.ranks = ranks
    return TECHNIQUES[step.technique].apply(step, context), baked(context.model.module).state_dict()


def batch_norm(ranks: Ranks, inputs: Tensor, above: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Outputs, statistics and gradients of this rank's rows; a rank without any has a stand-in."""
    start = sum(sizes[: ranks.rank])
    rows = slice(start, start + sizes[ranks.rank])
    counts = sizes[ranks.rank] > 0
    own = (inputs[rows] if counts else inputs[:1]).clone().requires_grad_()
    weight, bias = (torch.linspace(*ends, inputs.shape[1]).requires_grad_() for ends in ((0.5, 2.0), (-1.0, 1.0)))
    outputs, mean, variance, count = normalized(own, weight, bias, 1e-5, ranks, counts)
    outputs.backward(above[rows] if counts else torch.zeros_like(outputs))
    assert own.grad is not None
    assert counts or not own.grad.any()
    assert weight.grad is not None
    assert bias.grad is not None
    gradients = ranks.total(weight.grad), ranks.total(bias.grad)
    return (outputs.detach()[: len(above[rows])], own.grad[: len(above[rows])], mean, variance, count, *gradients)


def collectives(ranks: Ranks) -> dict[str, Any]:
    mine = torch.tensor([float(ranks.rank), 1.0])
    other = mine.clone()
    ranks.alike([other])
    return {
        "total": ranks.total(mine.clone()),
        "gathered": ranks.gathered(mine),
        "listed": ranks.listed({"rank": ranks.rank}),
        "told": ranks.told(lambda: f"by {ranks.rank}"),
        "alike": other,
        "first": ranks.first,
    }


def astray(ranks: Ranks, by: float) -> str:
    """What is said of processes of which the last has a weight that is `by` off."""
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.fill_(1.0)
        module.bias.fill_(by if ranks.rank == ranks.size - 1 else 0.0)
    try:
        check_same(module, ranks)
    except RuntimeError as error:
        return str(error)
    return "the same"


def crewed(_: Ranks, folder: Path, what: str) -> str:
    """What comes of a job of three processes, of which the last does something."""

    def follow(ranks: Ranks) -> None:
        if ranks.rank == 2:
            _do(what)
        ranks.total(torch.ones(1))
        if what == "lags":
            time.sleep(0.3 * ranks.rank)
            (folder / f"ready-{ranks.rank}").touch()
            ranks.part()
            time.sleep(0.3 * ranks.rank)
            (folder / f"over-{ranks.rank}").touch()

    def problem_of(error: Exception) -> Problem:
        return (error if isinstance(error, TersorError) else JobFailed(str(error))).problem()

    pids: list[psutil.Process] = []
    try:
        with crew(Place(3, folder), follow, problem_of) as ranks:
            pids = psutil.Process().children()
            total = ranks.total(torch.ones(1)).item()
            if what == "lags":
                ranks.part()
                assert len(list(folder.glob("ready-*"))) == 2
            if what == "first fails":
                raise InvalidSpec("no good", pointer="/steps/0")
    except TersorError as error:
        problem = error.problem()
        return f"{problem.code} {problem.pointer}: {problem.detail}; {sum(pid.is_running() for pid in pids)} left"
    return f"{total:g}; {sum(pid.is_running() for pid in pids)} left"


def _do(what: str) -> None:
    match what:
        case "ends":
            os._exit(3)
        case "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "refuses":
            raise InvalidSpec("a bad spec", pointer="/steps/1")
        case "fails":
            raise ValueError("an error of ours")


def judged(ranks: Ranks, split: str) -> dict[str, Any]:
    """The metrics of an untrained network and of one for values, over all processes."""
    found = {}
    data = digits_data()
    for name, task in {"classes": Classification(), "values": Regression(), "vectors": SentenceEmbedding()}.items():
        model = replace(tiny_model(mlp()), task=task)
        task.evaluation_batch = 60  # five batches of 250: not as many for each
        if name == "values":
            held = data.splits[split]
            assert isinstance(held, MemorySplit)
            labels = held.targets
            assert labels is not None
            values = functional.one_hot(labels, 10).float()
            data = replace(data, splits={**data.splits, split: MemorySplit(held.inputs, values)})
        feed = Feed(model, data)
        found[name] = feed.scores(lambda inputs: model.module(*inputs).detach(), split, ranks)  # noqa: B023
        data = digits_data()
    return found


def held(ranks: Ranks, sharded: bool) -> dict[str, int]:
    """Bytes that a process holds after a step, and what the module itself still has meanwhile."""
    module = Stacked()
    shards = Shards(module, ranks) if sharded else None
    trained = module if shards is None else shards.module
    optimizer = torch.optim.Adam(trained.parameters())
    trained(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    kept = [value for own in optimizer.state.values() for value in own.values()]
    parameters = list(trained.parameters())
    return {
        "weights": sum(local(weight).nbytes for weight in parameters),
        "gradients": sum(local(weight.grad).nbytes for weight in parameters if weight.grad is not None),
        "optimizer": sum(local(value).nbytes for value in kept if value.ndim),
        "released": sum(weight.nbytes for weight in module.parameters()) if sharded else 0,
    }


def exchanged(ranks: Ranks) -> dict[str, Any]:
    """What each of them gets from all others: little by lines, more by gloo."""
    mine = float(ranks.rank)
    return {
        "rank": ranks.rank,
        "leads": ranks.leads,
        "total": ranks.total(torch.full((3,), mine)),
        "large": ranks.total(torch.full((1 << 18,), mine)),
        "listed": ranks.listed(ranks.rank),
        "told": ranks.told(lambda: f"from {ranks.rank}"),
    }
