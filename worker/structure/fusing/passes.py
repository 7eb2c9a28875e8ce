"""The passes over a network that leave out what it computes for nothing, each tried before it counts."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from app.contract.fusing import PASSES, Pass
from worker.constraints import baked
from worker.data.batch import Inputs
from worker.structure.dropping import dropped
from worker.structure.edits import Edit, apply
from worker.structure.fusing import simplified
from worker.structure.fusing.edit import FUSE, REPLACE, Change, enact, fused
from worker.structure.fusing.foldable import Stays, foldable
from worker.structure.fusing.graph_runs import Runs
from worker.structure.fusing.idle import dead_layers, idle_layers, kept_places
from worker.structure.fusing.judging import Judge
from worker.structure.fusing.unnamed import unnamed
from worker.structure.fusing.watching import watched

MOST_ROUNDS = 8  # of passes over a graph; what one leaves another may find
Rows = list[dict[str, float | int | str | None]]


@dataclass
class Fusion:
    """The edits; by pass how much was done, or why it was refused; `folds`, `dead` layers and tensors with how many
    numbers they held, and why batch norms stay, by name. `difference` is that of the outputs in the end, and `rounding`
    what float32 takes from the outputs of the network as it came; shares of the largest."""

    edits: list[Edit] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    folds: list[dict[str, str]] = field(default_factory=list)
    dead: Rows = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    difference: float = 0.0
    rounding: float = 0.0


def make(module: nn.Module, edits: Sequence[Edit]) -> None:
    """Applies edits in place, with the values of those that fuse."""
    for edit in edits:
        if edit["kind"] == FUSE:
            enact(module, edit)
        else:
            apply(module, [edit])


def fuse(
    module: nn.Module, inputs: Sequence[Inputs], judged: Sequence[Inputs], passes: Sequence[Pass], stays: Stays, *,
    for_inference: bool,
) -> Fusion:  # fmt: skip
    """What the passes find; the module stays as it is. A pass behind which outputs for the `judged` inputs differ is
    refused."""
    return _Fuser(module, inputs, judged, stays, for_inference).run(passes)


class _Fuser:
    def __init__(
        self, module: nn.Module, inputs: Sequence[Inputs], judged: Sequence[Inputs], stays: Stays, for_inference: bool
    ) -> None:
        self._work = baked(module).eval()
        self._inputs, self._stays, self._for_inference = inputs, stays, for_inference
        self._judge = Judge(self._work, judged)
        self._found = Fusion(rounding=self._judge.rounding)
        self._constants = 0

    def run(self, passes: Sequence[Pass]) -> Fusion:
        ways: dict[Pass, Callable[[], bool]] = {
            "batch_norm": self._batch_norm,
            "constants": self._constants_stored,
            "identities": self._identities,
            "common": self._common,
            "dead": self._dead,
        }
        own = [name for name in PASSES if name in passes]
        self._found.done = dict.fromkeys(own, 0)
        for _ in range(MOST_ROUNDS):
            changed = [ways[name]() for name in own if name not in self._found.refused]
            if not any(changed) or not isinstance(self._work, fx.GraphModule):
                break
        return self._found

    def _try(self, name: Pass, edits: Sequence[Edit], count: int) -> bool:
        """Takes the edits up where the network gives the same with them."""
        trial = copy.deepcopy(self._work)
        try:
            make(trial, edits)
            gap = self._judge.gap(trial)
        except Exception as error:  # models raise errors of every class
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            self._found.refused[name] = f"behind it the network does not run: {said}"
            return False
        if not gap <= self._judge.most:
            self._found.refused[name] = f"behind it outputs differ by {gap:.1e} of the largest"
            return False
        self._work = trial.eval()
        self._found.edits += edits
        self._found.done[name] += count
        self._found.difference = gap
        return True

    def _batch_norm(self) -> bool:
        """In rounds on a copy, in which what was folded is an identity, so that names stay what they are."""
        trial, folds = copy.deepcopy(self._work), list[dict[str, str]]()
        while True:
            found = foldable(trial, self._inputs[0], self._stays)
            if not found.folds:
                break
            enact(trial, fused(folds=found.folds, identities=[one["norm"] for one in found.folds]))
            folds += found.folds
        self._found.kept = found.kept
        if not folds:
            return False
        taken = self._try("batch_norm", self._folding(folds), len(folds))
        self._found.folds += folds if taken else []
        return taken

    def _folding(self, folds: Sequence[dict[str, str]]) -> list[Edit]:
        norms = [one["norm"] for one in folds]
        if isinstance(self._work, fx.GraphModule):
            calls = {str(node.target): node for node in self._work.graph.nodes if node.op == "call_module"}
            nodes = [calls[name] for name in norms]
            changes = [_replaced(node.name, node.all_input_nodes[0].name) for node in _last_first(nodes)]
            return [fused(folds=folds, graph=changes, gone=norms)]
        if isinstance(self._work, nn.Sequential):
            return [fused(folds=folds), dropped(kept_places(self._work, norms), {})]
        return [fused(folds=folds, identities=norms)]

    def _constants_stored(self) -> bool:
        if not isinstance(self._work, fx.GraphModule):
            return False
        changes = simplified.constants(self._work, self._constants)
        self._constants += len(changes)
        return bool(changes) and self._try("constants", [fused(graph=changes)], len(changes))

    def _identities(self) -> bool:
        if isinstance(self._work, fx.GraphModule):
            runs = Runs(self._work, self._inputs)
            changes = simplified.identities(self._work, runs, for_inference=self._for_inference)
            return bool(changes) and self._try("identities", [fused(graph=changes)], len(changes))
        if not isinstance(self._work, nn.Sequential):
            return False
        names = idle_layers(self._work, for_inference=self._for_inference)
        return bool(names) and self._try("identities", [dropped(kept_places(self._work, names), {})], len(names))

    def _common(self) -> bool:
        if not isinstance(self._work, fx.GraphModule):
            return False
        changes = simplified.common(self._work)
        return bool(changes) and self._try("common", [fused(graph=changes)], len(changes))

    def _dead(self) -> bool:
        if isinstance(self._work, nn.Sequential):
            return False  # one layer reads what the other gives
        graph = isinstance(self._work, fx.GraphModule)
        names = unnamed(self._work) if graph else dead_layers(self._work, self._inputs)
        rows: Rows = [{"name": name, "values": _values(self._work, name)} for name in names]
        edit = fused(gone=names) if graph else fused(identities=names)
        taken = bool(names) and self._try("dead", [edit], len(names))
        self._found.dead += rows if taken else []
        return taken


def _replaced(node: str, by: str) -> Change:
    return {"do": REPLACE, "node": node, "by": by}


def _last_first(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """A norm behind a norm gives way to that, and then that to what is in front of it."""
    return sorted(nodes, reverse=True)


def _values(module: nn.Module, name: str) -> int:
    """How many numbers a layer or a tensor holds."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return sum(own.numel() for key, own in tensors if key == name or key.startswith(f"{name}."))


def kinds(module: nn.Module, inputs: Inputs) -> Counter[str]:
    """How many nodes of each kind a graph has; of another network, operators that a pass runs."""
    if isinstance(module, fx.GraphModule):
        return Counter(simplified.nodes_by_kind(module))
    return watched(module, inputs).kinds()
