"""Patterns of names, by which a step is told what stays as it is."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is for a layer of this name, for its weight, or for what it lies in."""
    parts = name.split(".")
    ways = (f"{name}.weight", *(".".join(parts[: count + 1]) for count in range(len(parts))))
    return any(fnmatchcase(way, pattern) for way in ways)
