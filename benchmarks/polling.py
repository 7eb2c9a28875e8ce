"""Status polling against a bare FastAPI route that returns a constant

Four clients poll as fast as they can over kept-alive connections, in turns against either server. Tersor reads the job
from the database for every request.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from pathlib import Path

import httpx

from app.client import Client
from app.launch import service
from benchmarks.harness import bare_server, in_turns, ratio, table, where
from benchmarks.models import pruning_job

CLIENTS = 4
SECONDS = 3.0
ROUNDS = 5


def poll(url: str) -> float:
    """Requests a second of all clients together."""
    counts = [0] * CLIENTS
    end = time.perf_counter() + SECONDS

    def run(index: int) -> None:
        with httpx.Client() as client:
            while time.perf_counter() < end:
                client.get(url).raise_for_status()
                counts[index] += 1

    threads = [threading.Thread(target=run, args=(i,)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / SECONDS


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as name, service(Path(name)) as url, bare_server("benchmarks.bare:app") as bare:
        with Client(url) as client:
            job = client.wait(client.submit(pruning_job(client, Path(name)))["id"])["id"]
        rivals = {"tersor": lambda: poll(f"{url}/v1/jobs/{job}"), "bare": lambda: poll(f"{bare}/job")}
        results = in_turns(rivals, ROUNDS)
    table(
        ["clients", "Tersor, requests/s", "bare FastAPI, requests/s", "ratio", "aim"],
        [
            [
                str(CLIENTS),
                f"{statistics.median(results['tersor']):.0f}",
                f"{statistics.median(results['bare']):.0f}",
                f"{ratio(results['tersor'], results['bare']):.2f}",
                ">= 0.5",
            ]
        ],
    )
    where("fastapi", "uvicorn", "sqlalchemy")
