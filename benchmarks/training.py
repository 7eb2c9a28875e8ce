"""Training loop against one written by hand

LeNet-5 on real MNIST digits, Adam, batches of 64: Tersor's loop (progress, divergence check, per-step rates) against
the plain one of a torch tutorial that indexes tensors in memory. All run the same steps, in turns; the third has
80 % of its weights masked.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.contract.facts import DatasetFacts, ModelFacts, SplitFacts, TensorFacts
from app.contract.spec import Prune
from app.contract.training import Training
from benchmarks.harness import in_turns, ratio, seconds, table, where
from worker.context import Context
from worker.data.base import Data, RawBatch
from worker.data.batch import Inputs
from worker.data.feed import Feed
from worker.demo.train_lenet import lenet, mnist
from worker.model import Model
from worker.objectives.classification import Classification
from worker.techniques.pruning.prune import PruneTechnique
from worker.training.loop import train

ROUNDS = 7
TRAINING = Training(epochs=2, lr=1e-3, batch_size=64)


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


def by_hand(module: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """The loop of a tutorial."""
    assert TRAINING.epochs is not None
    optimizer = torch.optim.Adam(module.parameters(), lr=TRAINING.lr)
    module.train()
    for _ in range(TRAINING.epochs):
        for chosen in torch.randperm(len(inputs)).split(TRAINING.batch_size):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(inputs[chosen]), targets[chosen])
            loss.backward()
            optimizer.step()


def main() -> None:
    """Prints the table."""
    arrays = mnist()
    inputs, targets = torch.from_numpy(arrays["train_inputs"]), torch.from_numpy(arrays["train_targets"])
    base = lenet()
    dense = context(copy.deepcopy(base), inputs, targets)
    masked = context(copy.deepcopy(base), inputs, targets)
    PruneTechnique().apply(Prune(sparsity=0.8), masked)
    plain = copy.deepcopy(base)
    rivals = {
        "plain": lambda: seconds(lambda: by_hand(plain, inputs, targets)),
        "tersor": lambda: seconds(lambda: train(dense, TRAINING)),
        "masked": lambda: seconds(lambda: train(masked, TRAINING)),
    }
    in_turns(rivals, 1)  # the first round pays for allocations and kernel selection
    results = in_turns(rivals, ROUNDS)
    assert TRAINING.epochs is not None
    samples = len(inputs) * TRAINING.epochs
    names = {"plain": "by hand", "tersor": "Tersor", "masked": "Tersor, 80 % masked"}
    rows = [
        [
            label,
            f"{samples / statistics.median(results[name]):,.0f}",
            f"{ratio(results['plain'], results[name]):.3f}",
        ]
        for name, label in names.items()
    ]
    table(["loop", "samples/s, median", "ratio to the one by hand"], rows)
    where("torch", "mlxtend")


def _encode(raw: RawBatch) -> Inputs:
    assert isinstance(raw.inputs, dict)
    return (raw.inputs["input"],)
