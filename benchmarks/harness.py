"""What every benchmark shares: turns, medians, a table, and a line that says where it ran."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import httpx

from app.launch import free_port


def heading(module: ModuleType) -> str:
    """The first line of a benchmark's docstring."""
    return (module.__doc__ or module.__name__).splitlines()[0]


def in_turns(rivals: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs each rival once a round, in turn, and returns each one's results."""
    results: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, rival in rivals.items():
            results[name].append(rival())
    return results


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def table(columns: list[str], rows: list[list[str]]) -> None:
    """Prints a Markdown table."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def ratio(mine: list[float], theirs: list[float]) -> float:
    """Median over rounds of mine / theirs, so that what slows the machine for a while slows both."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def where(*packages: str) -> None:
    """Prints cores and versions."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"\n{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {versions}")


@contextlib.contextmanager
def bare_server(application: str) -> Iterator[str]:
    """A bare ASGI application on uvicorn, in a process of its own; yields its URL."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", application, "--port", str(port), "--log-level", "warning"]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(url)
                break
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait()
