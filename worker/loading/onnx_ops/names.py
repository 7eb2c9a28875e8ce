"""Names of layers and weights: those of the file's tensors, made valid, short and unique.

`features.0.weight` names the layer `features.0`, `StatefulPartitionedCall/model/conv1/Conv2D/ReadVariableOp:0` becomes
`StatefulPartitionedCall.model.conv1.Conv2D.ReadVariableOp_0`. fx writes names into the source of `forward`, so nothing
but letters, digits and underscores ever reaches it.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter

from torch import fx, nn

MAX_LENGTH = 200
MAX_PARTS = 16  # of a path: modules nest so deep
_WEIGHT = re.compile(r"[./_]?(weight|kernel|W)$")
_TAKEN = frozenset(dir(nn.Module()) + dir(fx.GraphModule))


class Names:
    """The paths given so far."""

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._parents: set[str] = set()
        self._numbers: Counter[str] = Counter()

    def layer(self, tensor: str) -> str:
        """A new path for the layer that a weight belongs to."""
        return self.fresh(_WEIGHT.sub("", tensor) or tensor)

    def fresh(self, name: str) -> str:
        """A new path like `name`, which is neither that of another module nor leads through one."""
        parts = [_valid(part) for part in re.split(r"[./]+", name[:MAX_LENGTH]) if part] or ["unnamed"]
        path, flat = ".".join(parts), "_".join(parts)
        if len(parts) > MAX_PARTS or not self._is_free(path):
            path = flat
        while not self._is_free(path):
            self._numbers[flat] += 1
            path = f"{flat}_{self._numbers[flat] + 1}"
        self._given.add(path)
        self._parents.update(_parents(path))
        return path

    def _is_free(self, path: str) -> bool:
        return (
            path not in self._given
            and path not in self._parents
            and not any(parent in self._given for parent in _parents(path))
        )


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _valid(part: str) -> str:
    """Letters, digits and underscores, and no name that Python or a module has for itself."""
    valid = re.sub(r"[^0-9A-Za-z_]", "_", part)
    return f"{valid}_" if valid in _TAKEN or keyword.iskeyword(valid) or valid.startswith("__") else valid
