"""A worker is killed, a job is cancelled, the whole service is stopped: nothing is lost and nothing runs twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.client import Client
from app.launch import service
from tests.acceptance.conftest import SETTINGS, Service
from tests.acceptance.jobs import upload

LONG = {"technique": "finetune", "training": {"epochs": 400, "lr": 1e-4}}
HANG_SECONDS = 120.0


@pytest.fixture
def breakable(tmp_path: Path) -> Iterator[Service]:
    """A service of its own, for a test that breaks it."""
    with service(tmp_path, **SETTINGS) as url:
        yield Service(url, tmp_path)


def until(client: Client, job: str, condition: Any) -> dict[str, Any]:
    """The job once the condition holds."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition(current := client.job(job)):
        assert time.monotonic() < deadline, current
        time.sleep(0.05)
    return current


def worker_pid(tersor: Service) -> int:
    """The worker that said last that it lives, out of the database."""
    with sqlite3.connect(tersor.data / "tersor.db") as database:
        ((pid,),) = database.execute("SELECT pid FROM workers ORDER BY last_seen_at DESC LIMIT 1")
    return int(pid)


def processes_of(tersor: Service) -> list[psutil.Process]:
    """Every process that works for this service: they carry its data folder in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TERSOR_DATA_DIR") == str(tersor.data):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_killed_worker_loses_nothing(breakable: Service, lenet: Path) -> None:
    """SIGKILL in the middle of a step; the job runs again on the restarted worker and finishes once."""
    with breakable.client() as client:
        model, dataset = upload(client, lenet)
        steps = [{"technique": "finetune", "training": {"epochs": 12, "lr": 1e-4}}]
        job = client.submit({"model": model, "dataset": dataset, "steps": steps, "export": ["native"]})["id"]
        until(client, job, lambda now: now["step"] == "finetune" and now["progress"] > 0)
        os.kill(worker_pid(breakable), signal.SIGKILL)
        done = client.wait(job)
        assert done["state"] == "succeeded", done
        assert done["attempt"] == 2
        assert [artifact["name"] for artifact in client.artifacts(job)] == ["model.safetensors"]
    attempts = {path.parent.name for path in (breakable.data / "blobs" / "jobs" / job).rglob("*") if path.is_file()}
    assert attempts == {"2"}  # what the lost attempt may have left is not what clients get


def test_a_running_job_is_cancelled(tersor: Service, lenet: Path) -> None:
    """The state becomes cancelled and the job's processes are gone."""
    with tersor.client() as client:
        model, dataset = upload(client, lenet)
        job = client.submit({"model": model, "dataset": dataset, "steps": [LONG]})["id"]
        until(client, job, lambda now: now["step"] == "finetune")
        asked = time.monotonic()
        client.cancel(job)
        done = until(client, job, lambda now: now["state"] == "cancelled")
        # The promise is five seconds; twice that allows for a machine that is shared.
        assert time.monotonic() - asked < 10
        assert done["finished_at"]
        assert not list((tersor.data / "scratch").glob(f"{job}*"))


def test_a_queued_job_is_cancelled_at_once(tersor: Service, lenet: Path) -> None:
    with tersor.client() as client:
        model, dataset = upload(client, lenet)
        first = client.submit({"model": model, "dataset": dataset, "steps": [LONG]})["id"]
        second = client.submit({"model": model, "dataset": dataset, "steps": [LONG]})["id"]
        assert client.cancel(second)["state"] == "cancelled"
        client.cancel(first)
        until(client, first, lambda now: now["state"] == "cancelled")


def test_stopping_the_service_hands_the_job_back(tmp_path: Path, lenet: Path) -> None:
    """SIGTERM in the middle of a job, start again on the same folder: the job is still there and finishes."""
    with service(tmp_path, **SETTINGS) as url, Client(url) as client:
        model, dataset = upload(client, lenet)
        job = client.submit(
            {
                "model": model,
                "dataset": dataset,
                "steps": [{"technique": "finetune", "training": {"epochs": 12, "lr": 1e-4}}],
                "export": ["native"],
            }
        )["id"]
        until(client, job, lambda now: now["step"] == "finetune" and now["progress"] > 0)
        first = Service(url, tmp_path)
        before = processes_of(first)
        assert before
    _, alive = psutil.wait_procs(before, timeout=15)
    assert not alive, "processes outlived the service"
    with service(tmp_path, **SETTINGS) as url, Client(url) as client:
        assert client.wait(job)["state"] == "succeeded"


def test_too_long_and_too_large_fail_with_a_code(tmp_path: Path, lenet: Path) -> None:
    with service(tmp_path, **SETTINGS, TERSOR_JOB_TIMEOUT_SECONDS="4") as url, Client(url) as client:
        model, dataset = upload(client, lenet)
        done = client.wait(client.submit({"model": model, "dataset": dataset, "steps": [LONG]})["id"])
        assert (done["state"], done["error"]["code"]) == ("failed", "timeout")
