"""How the ranks of a job find each other: each leaves a card in a folder, which says where it waits for the others.

Ranks of other hosts leave theirs in a second folder, by way of the workers: what those share is the database, so that
whoever has no access to it takes no part.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"  # the interface
CONNECT_SECONDS = 60.0
LOOK_SECONDS = 0.005


@dataclass(frozen=True)
class Place:
    """One host's part in a job: `processes` ranks on each of `hosts`, of which it is the one with number `host`.

    `folder` is where its ranks leave their cards; those of others come to `others`. Connections go over `interface`.
    Who waits for the others gives up after `patience` seconds.
    """

    processes: int
    folder: Path
    host: int = 0
    hosts: int = 1
    others: Path | None = None
    interface: str = LOOPBACK
    patience: float = CONNECT_SECONDS

    @property
    def size(self) -> int:
        """All ranks of the job."""
        return self.processes * self.hosts

    @property
    def connections(self) -> int:
        """Of each rank, beyond Unix sockets: gloo's to all others, and a line to each of another host."""
        return self.size - 1 + self.size - self.processes

    @property
    def first(self) -> int:
        """The rank that is the first one here."""
        return self.processes * self.host


class Meeting(dist.Store):  # type: ignore[name-defined,misc]
    """The little of a store of torch.distributed that gloo needs: a card is set once, and got by everyone."""

    def __init__(self, folder: Path, others: Path | None = None) -> None:
        super().__init__()
        folder.mkdir(exist_ok=True)
        self._folders = (folder, *([] if others is None else [others]))

    def set(self, key: str, value: str | bytes) -> None:
        card = self._folders[0] / _name(key)
        unfinished = card.with_name(f".{card.name}")
        unfinished.write_bytes(value.encode() if isinstance(value, str) else bytes(value))
        os.rename(unfinished, card)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return next(path for path in self._paths(key) if path.exists()).read_bytes()

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        """Raises RuntimeError where a card does not come in time."""
        seconds = CONNECT_SECONDS if timeout is None else timeout.total_seconds()
        for key in keys:
            if not _comes(lambda key=key: any(path.exists() for path in self._paths(key)), seconds):  # type: ignore[misc]
                raise RuntimeError(f"one of the processes did not come within {seconds:.0f} seconds")

    def check(self, keys: list[str]) -> bool:
        return all(any(path.exists() for path in self._paths(key)) for key in keys)

    def _paths(self, key: str) -> list[Path]:
        return [folder / _name(key) for folder in self._folders]


def _name(key: str) -> str:
    """A file's name for a key, which may have any characters."""
    return key.encode().hex()


def _comes(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_SECONDS)
    return True
