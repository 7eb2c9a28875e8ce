"""Weights of a smaller network of transformers out of those of a larger one: by name, by size, by what is largest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from app.contract.errors import Unsupported
from worker.students.configs import Shrunk
from worker.students.depths import spread

Group = tuple[str, int, int]
"""Features that are kept or dropped together: the layer that they are of ("" for all layers), their number before and
after."""


def inherited(
    small: Mapping[str, Tensor], large: Mapping[str, Tensor], shrunk: Shrunk
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict of a smaller network, in the shapes of `small`, and which layer each of its layers was.

    Layers that are left are spread evenly over those that were. Dimensions of one size lose the same entries all over
    the network, those of the least weights (the sum of their squares), so that what is added or multiplied still
    belongs together. Raises Unsupported for a weight whose shape cannot be followed.
    """
    origins = _origins(small, large)
    pairs = {name: (small[name], large[old]) for name, old in origins.items() if old in large}
    if missing := sorted(set(small) - set(pairs)):
        raise _unclear(missing[0])
    chosen = _chosen(pairs, shrunk)
    state = {name: _sliced(name, *pair, shrunk, chosen) for name, pair in pairs.items()}
    return state, _moved(origins)


def _sliced(name: str, small: Tensor, large: Tensor, shrunk: Shrunk, chosen: Mapping[Group, Tensor]) -> Tensor:
    for dim, (before, after) in enumerate(zip(large.shape, small.shape, strict=True)):
        if before != after:
            large = large.index_select(dim, _indices(name, before, after, shrunk, chosen))
    return large.clone()


def _indices(name: str, before: int, after: int, shrunk: Shrunk, chosen: Mapping[Group, Tensor]) -> Tensor:
    tiles = _tiles(before, after, shrunk)
    own = chosen[_group(name, before // tiles, after // tiles, shrunk)]
    size = before // tiles
    if size in shrunk.shared:
        unit = size // shrunk.units
        own = (own[:, None] * unit + torch.arange(unit)).flatten()
    return torch.cat([own + tile * size for tile in range(tiles)])


def _group(name: str, before: int, after: int, shrunk: Shrunk) -> Group:
    if before in shrunk.shared:
        return "", shrunk.units, shrunk.kept
    return (_layer(name) if before in shrunk.inner else ""), before, after


def _tiles(before: int, after: int, shrunk: Shrunk) -> int:
    """How many times shared features are repeated: queries, keys and values may be one matrix of three."""
    if before in shrunk.shared or before in shrunk.inner:
        return 1
    three = before % 3 == 0 and before // 3 in shrunk.shared
    return 3 if three and after * shrunk.units == before * shrunk.kept else 1


def _chosen(pairs: Mapping[str, tuple[Tensor, Tensor]], shrunk: Shrunk) -> dict[Group, Tensor]:
    """The entries of each group that are kept, int64 in order."""
    scores: dict[Group, Tensor] = {}
    for name, (small, large) in pairs.items():
        if small.ndim != large.ndim:
            raise _unclear(name)
        for dim, (before, after) in enumerate(zip(large.shape, small.shape, strict=True)):
            if before == after:
                continue
            tiles = _tiles(before, after, shrunk)
            group = _group(name, before // tiles, after // tiles, shrunk)
            known = before // tiles in shrunk.shared | shrunk.inner or shrunk.units == 1
            if not known or after > before or after * group[1] != before * group[2]:
                raise _unclear(name)
            found = scores.setdefault(group, torch.zeros(group[1]))
            if large.ndim > 1:  # a bias or a norm says nothing of how much a feature matters
                energy = large.float().square().movedim(dim, 0).flatten(1).sum(1)
                found += energy.reshape(tiles, group[1], -1).sum((0, 2))
    return {group: score.topk(group[2]).indices.sort().values for group, score in scores.items()}


def _unclear(name: str) -> Unsupported:
    return Unsupported(f"How {name!r} becomes narrower is not known for this kind of model. Give shrink: depth.")


def _origins(small: Mapping[str, Tensor], large: Mapping[str, Tensor]) -> dict[str, str]:
    """The name that each weight of the smaller network had in the larger one."""
    now, before = _numbers(small), _numbers(large)
    found = {}
    for name in small:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if not part.isdigit():
                continue
            ours = now[".".join(name.split(".")[:i])]
            theirs = before.get(".".join(parts[:i]), ours)
            if len(ours) < len(theirs):
                parts[i] = str(theirs[spread(len(theirs), len(ours))[ours.index(int(part))]])
        found[name] = ".".join(parts)
    return found


def _numbers(names: Iterable[str]) -> dict[str, list[int]]:
    """The numbered children of each layer that have weights, in order."""
    found: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                found.setdefault(".".join(parts[:i]), set()).add(int(part))
    return {prefix: sorted(numbers) for prefix, numbers in found.items()}


def _moved(origins: Mapping[str, str]) -> dict[str, str]:
    """Layers of stacks that lost some: each one's name before, by its name now."""
    found: dict[str, str] = {}
    for name, old in origins.items():
        parts, before = name.split("."), old.split(".")
        for i, part in enumerate(parts):
            if part != before[i]:
                found[".".join(parts[: i + 1])] = ".".join(before[: i + 1])
    return found


def _layer(name: str) -> str:
    """The numbered layer that a weight belongs to."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])
