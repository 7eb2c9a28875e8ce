"""What the corpus' children run: the real inspection, with what it took told at its end on standard output.

Importing it imports all that a worker keeps in memory, so that the fork server can preload it.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import worker.loading.huggingface
import worker.preload  # noqa: F401
from app.contract.errors import ModelRejected
from tests.hostile.member import CANARY
from worker import entries
from worker.child import Report
from worker.entries import InspectRequest
from worker.messages import Inspected

PREFIX = "figures "


@dataclass
class Figures:
    """CPU seconds, bytes of memory beyond the bare child, canaries in the scratch folder."""

    seconds: float = 0.0
    bytes: int = 0
    canaries: int = 0
    tally: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def line(self) -> str:
        return PREFIX + json.dumps(asdict(self))


def parsed(printed: str) -> Figures | None:
    """What a child told, None where it did not come to that."""
    line = printed.rstrip().rpartition("\n")[2]
    return Figures(**json.loads(line.removeprefix(PREFIX))) if line.startswith(PREFIX) else None


def cpu_seconds() -> float:
    """Of this process and the children that it waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def peak_bytes() -> int:
    """The most that this process was; one that was forked begins with what it had then."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def canaries(folder: Path) -> int:
    return sum(1 for _ in folder.rglob(f"{CANARY}*"))


def tell(line: str) -> None:
    """A line for the worker's log."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@contextmanager
def told(scratch: Path) -> Iterator[Figures]:
    """Figures of what is done within, printed whatever comes of it."""
    figures, seconds, before = Figures(), cpu_seconds(), peak_bytes()
    try:
        yield figures
    finally:
        figures.seconds = figures.seconds or round(cpu_seconds() - seconds, 3)
        figures.bytes = peak_bytes() - before
        figures.canaries += canaries(scratch)
        tell(figures.line())


def inspection(request: InspectRequest, progress: Report) -> Inspected:
    with told(request.scratch):
        return entries.inspection(request, progress)


def gullible(request: InspectRequest, progress: Report) -> Inspected:
    """What the inspection must not be: each library reads the file in its own way."""
    with told(request.scratch):
        for read in (_unpickle, torch.load, torch.export.load):
            with contextlib.suppress(Exception):  # it is the canary that tells
                read(request.path, **({"weights_only": False} if read is torch.load else {}))
    raise ModelRejected("This file was read by its own libraries, which is never done.")


def _unpickle(path: Path) -> None:
    pickle.loads(path.read_bytes())
