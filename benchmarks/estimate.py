"""Estimates of a dry run against the jobs themselves

Each job is dry-run on the service and then run. Seconds are those of the job alone (started to finished); memory is the
highest that the worker's own measure of a job's processes shows while it runs.
"""

from __future__ import annotations

import os
import tempfile
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from app.client import WAIT_SECONDS, Client
from app.launch import service
from benchmarks.harness import table, where
from worker.demo import train_lenet
from worker.limits import members, memory_of

DISTILLED = {"epochs": 4, "distill": {}}
JOBS: dict[str, list[dict[str, Any]]] = {
    "prune at once": [{"technique": "prune", "sparsity": 0.5}],
    "static int8": [{"technique": "quantize"}],
    "4 epochs": [{"technique": "finetune", "training": {"epochs": 4}}],
    "gradual pruning, distilled, int8": [
        {"technique": "prune", "sparsity": 0.8, "schedule": "cubic", "training": DISTILLED},
        {"technique": "quantize"},
    ],
}
LOOK_SECONDS = 0.5  # to look costs time that the job does not get


class Peak:
    """Watches the process groups of this process's descendants that are jobs: all but the service's own group."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            leaders = [child.pid for child in psutil.Process().children(recursive=True)]
            self.bytes = max([self.bytes, *(_held(pid) for pid in leaders if _leads_a_job(pid))])


def _held(group: int) -> int:
    """Bytes that the processes of a group hold."""
    found = [memory_of(pid) for pid in members(group)]
    return sum(memory.own + memory.shared for memory in found)


def _leads_a_job(pid: int) -> bool:
    """A job's process leads a group of its own and was forked from the fork server."""
    try:
        parent = psutil.Process(pid).parent()
        return os.getpgid(pid) == pid and parent is not None and "forkserver" in " ".join(parent.cmdline())
    except (psutil.Error, ProcessLookupError):
        return False


def measured(client: Client, spec: dict[str, Any]) -> tuple[float, int]:
    """Seconds and peak bytes of a job."""
    with Peak() as peak:
        job = client.wait(client.submit(spec)["id"])
    assert job["state"] == "succeeded", job["error"]
    began, ended = (datetime.fromisoformat(job[name]) for name in ("started_at", "finished_at"))
    return (ended - began).total_seconds(), peak.bytes


def main() -> None:
    """Prints the table."""
    rows = []
    with tempfile.TemporaryDirectory() as name, service(Path(name)) as url, Client(url) as client:
        train_lenet.main(Path(name))
        model = client.upload_model(Path(name) / "lenet.safetensors", train_lenet.SPEC)["id"]
        dataset = client.upload_dataset(Path(name) / "mnist.npz")["id"]
        client.model(model, wait=WAIT_SECONDS)
        client.dataset(dataset, wait=WAIT_SECONDS)
        for title, steps in JOBS.items():
            spec = {"model": model, "dataset": dataset, "steps": steps}
            planned = client.dry_run(spec)["estimate"]
            seconds, memory = measured(client, spec)
            rows.append(
                [
                    title,
                    f"{planned['seconds']:.1f}",
                    f"{seconds:.1f}",
                    f"{planned['seconds'] / seconds:.2f}",
                    f"{planned['memory_bytes'] >> 20}",
                    f"{memory >> 20}",
                ]
            )
    table(["LeNet-5 on MNIST", "estimate, s", "job, s", "ratio", "estimate, MiB", "peak, MiB"], rows)
    where("torch", "onnxruntime", "mlxtend")
