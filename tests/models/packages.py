"""Where the packages of other people's models and data lie; none of them is a dependency, any of them may be absent."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOW = "run `make models`"


class Absent(Exception):
    """A package, or data, that is not on this machine; the message says which and how to get it."""


def module_folder(module: str) -> Path:
    """The folder of an importable package, which is not imported. Raises Absent."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise Absent(f"{module} is not installed: {HOW}")
    return Path(spec.submodule_search_locations[0])


def version(distribution: str) -> str:
    """Raises Absent where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise Absent(f"{distribution} is not installed: {HOW}") from None


def node_module(name: str) -> Path:
    """The folder of an npm package below $TERSOR_TEST_DATA or .models. Raises Absent."""
    for root in (os.environ.get("TERSOR_TEST_DATA"), ROOT / ".models"):
        if root is not None and (folder := Path(root) / "node_modules" / name).is_dir():
            return folder
    raise Absent(f"{name} is in no node_modules of $TERSOR_TEST_DATA or .models: {HOW}")


def debian_folder(path: str, package: str) -> Path:
    """A folder that a Debian package brings. Raises Absent."""
    if not (folder := Path(path)).is_dir():
        raise Absent(f"{path} is absent: apt-get install {package}")
    return folder
