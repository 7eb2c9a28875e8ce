"""API keys: every model, dataset, job and artifact belongs to an account and is 404 for others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.launch import service
from tests.acceptance.conftest import SETTINGS, Service
from tests.acceptance.jobs import run, upload


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that wants a key even on loopback."""
    folder = tmp_path_factory.mktemp("guarded")
    with service(folder, **SETTINGS, TERSOR_API_KEYS_REQUIRED="true") as url:
        yield Service(url, folder)


def create_key(tersor: Service, account: str) -> str:
    """A key, made as an operator makes it."""
    command = [sys.executable, "-m", "app.cli", "keys", "create", "--account", account]
    env = os.environ | {"TERSOR_DATA_DIR": str(tersor.data)}
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def test_accounts_do_not_see_each_other(guarded: Service, lenet: Path) -> None:
    mine, theirs = create_key(guarded, "mine"), create_key(guarded, "theirs")
    assert mine.startswith("tsr_")
    stored = (guarded.data / "tersor.db").read_bytes() + b"".join(p.read_bytes() for p in guarded.data.glob("*-wal"))
    assert mine.encode() not in stored  # only a hash is kept
    with guarded.client(mine) as client:
        model, dataset = upload(client, lenet)
        done, _ = run(client, model, dataset, steps=[{"technique": "prune", "sparsity": 0.5}], export=["native"])
    paths = [
        f"/v1/models/{model}",
        f"/v1/datasets/{dataset}",
        f"/v1/jobs/{done['id']}",
        f"/v1/jobs/{done['id']}/report",
        f"/v1/jobs/{done['id']}/artifacts",
        f"/v1/jobs/{done['id']}/artifacts/model.safetensors",
    ]
    for path in paths:
        assert ask(guarded, path, mine).status_code == 200
        assert ask(guarded, path, theirs).status_code == 404
        assert ask(guarded, path, None).status_code == 401
        assert ask(guarded, path, mine[:-1] + ("a" if mine[-1] != "a" else "b")).status_code == 401
    job = {"model": model, "dataset": dataset, "recipe": "int8"}
    refused = httpx.post(f"{guarded.url}/v1/jobs", json=job, headers=bearer(theirs))
    assert (refused.status_code, refused.json()["pointer"]) == (422, "/model")
    for kind in ("models", "datasets", "jobs"):
        assert ask(guarded, f"/v1/{kind}", theirs).json()["items"] == []
        assert len(ask(guarded, f"/v1/{kind}", mine).json()["items"]) == 1
    assert httpx.post(f"{guarded.url}/v1/jobs/{done['id']}/cancel", headers=bearer(theirs)).status_code == 404


def test_health_needs_no_key(guarded: Service) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json"):
        assert ask(guarded, path, None).status_code == 200


def bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def ask(tersor: Service, path: str, key: str | None) -> httpx.Response:
    return httpx.get(tersor.url + path, headers=bearer(key))
