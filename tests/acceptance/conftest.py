"""The whole service over HTTP: a real API process, a real worker, a real Valkey, started as `tersor up` starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.client import Client
from app.launch import service

SETTINGS = {
    # Short, so that a lost worker's job is picked up again within seconds.
    "TERSOR_LEASE_SECONDS": "4",
    "TERSOR_REPUBLISH_SECONDS": "1",
    # Two compute threads on two busy cores wait for each other: a test machine has other work.
    "TERSOR_WORKER_THREADS": "1",
}


@dataclass(frozen=True)
class Service:
    """A running service and where it keeps its data."""

    url: str
    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def client(self, key: str | None = None) -> Client:
        return Client(self.url, key)

    def leftovers(self) -> set[Path]:
        """Every file of the blob store and of the jobs' scratch folders, some of which go while they are listed."""
        walks = (os.walk(self.data / part) for part in ("blobs", "scratch"))
        return {Path(folder, name) for walk in walks for folder, _, names in walk for name in names}


@pytest.fixture(scope="session")
def tersor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests that do not break it."""
    folder = tmp_path_factory.mktemp("service")
    with service(folder, **SETTINGS) as url:
        yield Service(url, folder)


@pytest.fixture(scope="session")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's model and data: LeNet-5 trained on real MNIST digits, as in the demo."""
    folder = tmp_path_factory.mktemp("lenet")
    subprocess.run([sys.executable, "-m", "worker.demo.train_lenet", str(folder)], check=True)
    return folder
