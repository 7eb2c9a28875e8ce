"""Which ways of making a network smaller work on which: `python -m tests.worker.structure.support` prints the table of
docs/structure.md."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from torch import nn

from app.contract.errors import ModelRejected
from app.contract.factorizing import Factorize
from app.contract.facts import ModelFacts, TensorFacts
from app.contract.fusing import PASSES
from app.contract.rewiring import What
from benchmarks.harness import table
from tests.worker.helpers import tiny_model
from tests.worker.structure.nets import PUBLIC, network
from worker.data.batch import Inputs
from worker.loading import load_model
from worker.loading.describe import layer_facts
from worker.model import Model
from worker.structure.blocks import blocks
from worker.structure.calls import example_on
from worker.structure.connections.joins import connections, standing
from worker.structure.fusing.judging import looked_at
from worker.structure.fusing.passes import fuse
from worker.structure.graphs import graph_of
from worker.structure.groups import structure_of
from worker.structure.sound import standing as sound
from worker.techniques.structure.candidates import candidates
from worker.techniques.structure.rewire import batches_of

# ONNX files that public packages hold, below the folder that TERSOR_TEST_DATA names.
GRAPHS = {
    "Magika (TensorFlow)": "python/magika/models/standard_v3_3/model.onnx",
    "PP-OCR direction (Paddle)": "python/rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx",
    "PP-OCR detector (Paddle)": "python/rapidocr/models/PP-OCRv6_det_small.onnx",
    "PP-OCR recognizer (Paddle)": "python/rapidocr/models/PP-OCRv6_rec_small.onnx",
}
COLUMNS = [
    "network", "prune, structured; resize, width", "factorize", "resize, drop_layers", "resize, connections", "fuse",
]  # fmt: skip


def model_of(module: nn.Module, inputs: Inputs) -> Model:
    """A Model around a network and what goes into it."""
    own = tuple(
        TensorFacts(name=f"input_{i}", shape=tuple(one.shape[1:]), dtype=str(one.dtype).removeprefix("torch."))
        for i, one in enumerate(inputs)
    )
    model = tiny_model(nn.Linear(1, 1))
    facts = model.facts.model_copy(update={"format": "pt2", "inputs": own, "layers": layer_facts(module)})
    return Model(module, ModelFacts.model_validate(facts.model_dump()), model.encode, model.save, model.task)


def row(name: str, model: Model) -> list[str]:
    """What works, in numbers, or why it does not."""
    return [name, units_of(model), products_of(model), blocks_of(model), connections_of(model), fused_of(model)]


def units_of(model: Model) -> str:
    """Groups by kind of unit, and how many stay."""
    inputs = example_on(model.module, model, 2)
    structure = structure_of(model.module, inputs)
    found, why = sound(model.module, inputs, structure)
    kinds = Counter("heads" if group.in_blocks else "channels" for group in found)
    told = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())) or "none"
    return told + (f"; {len(why)} stay: {next(iter(why.values()))}" if why else "")


def products_of(model: Model) -> str:
    """How many layers may become products."""
    return _count(len(candidates(Factorize(energy=0.9), model)), "layer")


def blocks_of(model: Model) -> str:
    """How many blocks may go."""
    found = blocks(model)
    if found.found:
        return _count(len(found.found), "block")
    return "refused: " + (next(iter(found.kept.values())) if found.kept else "no blocks of its own")


def connections_of(model: Model) -> str:
    """How many may go of each kind."""
    graph, batches = graph_of(model), batches_of(model)
    told = [
        _count(len(found), kind)
        for what, kind in (("branches", "branch"), ("skips", "skip"), ("gates", "gate"))
        if (found := standing(graph, batches, connections(graph, batches[0], cast(What, what))).found)
    ]
    return ", ".join(told) or "refused: no ways that part and meet"


def fused_of(model: Model) -> str:
    """Batch norms that go, what else does, and how many norms stay."""
    inputs = looked_at(model)
    found = fuse(model.module, inputs, inputs, PASSES, lambda name: None, for_inference=False)
    told = [_count(found.done["batch_norm"], "batch norm")] if found.done["batch_norm"] else []
    rest = sum(count for name, count in found.done.items() if name not in ("batch_norm", "dead"))
    told += [_count(rest, "other operator")] if rest else []
    told += [f"{len(found.kept)} stay: {next(iter(found.kept.values()))}"] if found.kept else []
    return "; ".join(told) or "nothing to do"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "es" if what.endswith("ch") else "s")


def rows() -> Iterator[list[str]]:
    """Of all networks, and of the graphs that are there."""
    for name in (*PUBLIC, "lstm_deep"):
        module, inputs, _ = network(name)
        yield row(name, model_of(module, inputs))
    root = Path(os.environ.get("TERSOR_TEST_DATA", ".models"))
    with tempfile.TemporaryDirectory() as scratch:
        for name, path in GRAPHS.items():
            if (root / path).exists():
                yield _graph(name, root / path, Path(scratch))


def _graph(name: str, path: Path, scratch: Path) -> list[str]:
    for task in ("image-classification", "regression"):
        try:
            return row(name, load_model(path, path.name, {"task": task}, scratch))
        except ModelRejected as refused:
            why = refused.detail
    return [name, why[:80], *[""] * (len(COLUMNS) - 2)]


if __name__ == "__main__":
    table(COLUMNS, list(rows()))
