"""Training loop against one written by hand

LeNet-5 and a ResNet-20 on real MNIST digits, Adam, batches of 64: Tersor's loop (progress, divergence check, per-step
rates) against the plain one of a torch tutorial that indexes tensors in memory. All run the same steps, in turns; the
third has 80 % of its weights masked; the last learns from a teacher whose answers are kept, and has no such rival by
hand: it is held against the plain loop too.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.contract.distillation import Distill
from app.contract.facts import DatasetFacts, ModelFacts, SplitFacts, TensorFacts
from app.contract.spec import Prune
from app.contract.training import Training
from benchmarks.harness import in_turns, ratio, seconds, table, where
from benchmarks.resnet import resnet
from worker.context import Context
from worker.data.base import Data, RawBatch
from worker.data.batch import Inputs
from worker.data.feed import Feed
from worker.demo.train_lenet import lenet, mnist
from worker.model import Model
from worker.objectives.classification import Classification
from worker.techniques.pruning.prune import PruneTechnique
from worker.training.loop import train

ROUNDS = 5
TRAINING = Training(lr=1e-3, batch_size=64)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {"LeNet-5": (lenet, 8), "ResNet-20": (resnet, 2)}


class InMemory:
    """A split of tensors, as cheap as one can be."""

    has_targets = True

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def classes(self) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self.targets.numpy()
        return found

    def read(self, indices: Sequence[int]) -> RawBatch:
        chosen = torch.tensor(indices)
        return RawBatch({"input": self.inputs[chosen]}, self.targets[chosen])


def context(module: nn.Module, inputs: Tensor, targets: Tensor) -> Context:
    """A context around a module and its training digits."""
    tensor = TensorFacts(name="input", shape=(1, 28, 28), dtype="float32")
    facts = ModelFacts(
        format="architecture",
        task="image-classification",
        accepts=("arrays",),
        inputs=(tensor,),
        classes=10,
        parameters=0,
        layers=(),
    )
    splits = {"train": SplitFacts(samples=len(inputs), inputs=(tensor,), targets="classes")}
    model = Model(module, facts, _encode, lambda module, folder: folder, Classification())
    data = Data(DatasetFacts(kind="arrays", splits=splits), {"train": InMemory(inputs, targets)})
    return Context(
        model=model,
        teacher=module,
        feed=Feed(model, data),
        device=torch.device("cpu"),
        seed=0,
        scratch=Path(tempfile.gettempdir()),
        progress=lambda share: None,
    )


def by_hand(module: nn.Module, inputs: Tensor, targets: Tensor, epochs: int) -> None:
    """The loop of a tutorial."""
    optimizer = torch.optim.Adam(module.parameters(), lr=TRAINING.lr)
    module.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs)).split(TRAINING.batch_size):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(inputs[chosen]), targets[chosen])
            loss.backward()
            optimizer.step()


def compared(make: Callable[[], nn.Module], epochs: int) -> list[list[str]]:
    """The table's rows of one network."""
    arrays = mnist()
    inputs, targets = torch.from_numpy(arrays["train_inputs"]), torch.from_numpy(arrays["train_targets"])
    training = TRAINING.model_copy(update={"epochs": epochs})
    base = make()
    dense, masked, taught = (context(copy.deepcopy(base), inputs, targets) for _ in range(3))
    PruneTechnique().apply(Prune(sparsity=0.8), masked)
    taught.teacher = copy.deepcopy(base).eval().requires_grad_(False)
    distilled = training.model_copy(update={"distill": Distill()})
    plain = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder:
        taught.scratch = Path(folder)
        rivals = {
            "by hand": lambda: seconds(lambda: by_hand(plain, inputs, targets, epochs)),
            "Tersor": lambda: seconds(lambda: train(dense, training)),
            "Tersor, 80 % masked": lambda: seconds(lambda: train(masked, training)),
            "Tersor, distilled, answers kept": lambda: seconds(lambda: train(taught, distilled)),
        }
        in_turns(rivals, 1)  # the first round pays for allocations and kernel selection
        results = in_turns(rivals, ROUNDS)
    samples = len(inputs) * epochs
    return [
        [name, f"{samples / statistics.median(own):,.0f}", f"{ratio(results['by hand'], own):.3f}"]
        for name, own in results.items()
    ]


def main() -> None:
    """Prints the table."""
    rows = []
    for name, (make, epochs) in NETWORKS.items():
        rows += [[name, *row] for row in compared(make, epochs)]
    table(["network", "loop", "samples/s, median", "ratio to the one by hand"], rows)
    where("torch", "mlxtend")


def _encode(raw: RawBatch) -> Inputs:
    assert isinstance(raw.inputs, dict)
    return (raw.inputs["input"],)
