from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.sandbox.cell import Cell


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    """A place for probes, with a key of the service's and another job's folder beside them."""
    made = Cell(tmp_path)
    (made.outside / "scratch" / "job_other-1").mkdir(parents=True)
    for name in ("key", "tersor.db", "scratch/job_other-1/model"):
        (made.outside / name).write_text("secret")
    return made


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the same user that has nothing to do with the job, in a session of its own."""
    command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(120)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()
