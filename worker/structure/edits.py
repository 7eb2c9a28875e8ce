"""Changes of a network's structure in words that fit in a checkpoint: told again, they make the same shapes.

What is inside the shapes is not told: it is in the state of the network behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import nn

from worker.structure.connections.cutting import CUT, apply_cut
from worker.structure.dropping import DROP, apply_drop
from worker.structure.forms import Factors, factored
from worker.structure.fusing.edit import FUSE, apply_fuse
from worker.structure.narrowing import NARROW, apply_narrow

Edit: TypeAlias = dict[str, Any]
"""`kind`, and what that takes; JSON values."""


def factorized(layer: str, factors: Factors) -> Edit:
    """A layer becomes a product."""
    return {"kind": "factorize", "layer": layer, "form": factors.form, "ranks": list(factors.ranks)}


def apply(module: nn.Module, edits: Sequence[Edit]) -> None:
    """Changes the module in place, in order. New weights are not initialized. Raises KeyError for a kind that there is
    not, AttributeError for a layer."""
    for edit in edits:
        _APPLIED[edit["kind"]](module, edit)


def _factorize(module: nn.Module, edit: Edit) -> None:
    layer = module.get_submodule(edit["layer"])
    module.set_submodule(edit["layer"], factored(layer, Factors(edit["form"], tuple(edit["ranks"]))))


_APPLIED = {
    "factorize": _factorize,
    NARROW: apply_narrow,
    DROP: apply_drop,
    CUT: apply_cut,
    FUSE: apply_fuse,
}
