"""The client against a real service."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.client import Client, ClientError, sending
from app.contract.errors import TimedOut
from app.launch import free_port
from tests.app.service import STEPS, Service
from tests.contract.facts import COST, dataset_facts, model_facts

SPEC = {
    "task": "image-classification",
    "input": {"shape": [1, 28, 28], "dtype": "float32"},
    "architecture": {"layers": [{"type": "Flatten"}, {"type": "Linear", "in_features": 784, "out_features": 10}]},
}


def test_from_upload_to_download(service: Service, tmp_path: Path) -> None:
    weights, arrays = tmp_path / "m.safetensors", tmp_path / "d.npz"
    weights.write_bytes(b"weights" * 1000)
    arrays.write_bytes(b"arrays" * 1000)
    with Client(service.url) as client:
        model, dataset = client.upload_model(weights, SPEC), client.upload_dataset(arrays)
        assert model["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert (model["filename"], dataset["filename"]) == ("m.safetensors", "d.npz")
        assert model["spec"] == SPEC
        service.store.finish_inspection(service.claim(model["id"]), model_facts())
        service.store.finish_inspection(service.claim(dataset["id"]), dataset_facts())
        assert client.model(model["id"], wait=5)["status"] == "ready"
        assert client.dataset(dataset["id"], wait=5)["status"] == "ready"
        spec = {"model": model["id"], "dataset": dataset["id"], "recipe": "int8"}
        assert client.submit(spec, "key-1")["id"] == client.submit(spec, "key-1")["id"]
        job = service.finished()
        (artifact,) = client.artifacts(job)
        path = client.download(job, artifact["name"], tmp_path)
        assert path == tmp_path / "model.onnx"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == artifact["sha256"]
        assert client.report(job)["seed"] == 0
        assert client.cancel(client.submit(spec)["id"])["state"] == "cancelled"


def test_following_a_job(service: Service) -> None:
    job = service.job()["id"]
    claim = service.claim(job)
    seen: list[dict[str, Any]] = []

    def on_change(now: dict[str, Any]) -> None:
        """Each look is followed by the next change, so that every change is seen."""
        seen.append(now)
        if now["progress"] < 0.5:
            threading.Timer(0.1, service.store.heartbeat, (claim, 60, 0.5, "prune")).start()
        elif now["state"] == "running":
            threading.Timer(0.1, service.store.fail_job, (claim, TimedOut().problem())).start()

    with Client(service.url) as client:
        done = client.wait(job, on_change=on_change)
    assert [(now["state"], now["progress"]) for now in seen] == [("running", 0), ("running", 0.5), ("failed", 0.5)]
    assert done == seen[-1]


def broken(client: Client, times: int, monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    """After the first answer the connection breaks so often, and then answers again."""
    answer, left = client._http.request, iter(range(times))

    def request(*args: Any, **kwargs: Any) -> httpx.Response:
        if kwargs["headers"]:
            if next(left, None) is not None:
                raise httpx.ReadError("reset", request=httpx.Request("GET", "http://service"))
            then()
        return answer(*args, **kwargs)

    monkeypatch.setattr(client._http, "request", request)


def test_a_job_is_followed_over_an_interruption(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job = service.job()["id"]
    claim = service.claim(job)
    with Client(service.url) as client:
        broken(client, 2, monkeypatch, lambda: service.store.fail_job(claim, TimedOut().problem()))
        assert client.wait(job)["state"] == "failed"


def test_a_service_that_stays_silent_is_given_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "PATIENCE_SECONDS", 0.5)
    job = service.job()["id"]
    with Client(service.url) as client:
        broken(client, 1000, monkeypatch, lambda: None)
        with pytest.raises(ClientError) as silence:
            client.wait(job)
    assert silence.value.code == "unreachable"


def test_problems_are_errors(service: Service, tmp_path: Path) -> None:
    with Client(service.url) as client:
        with pytest.raises(ClientError, match="/steps/0/sparsity") as refused:
            client.submit({"model": "mdl_" + "0" * 26, "steps": [{"technique": "prune", "sparsity": 3}]})
        assert (refused.value.status, refused.value.code) == (422, "invalid_spec")
        with pytest.raises(ClientError) as missing:
            client.download(service.finished(), "other", tmp_path)
        assert (missing.value.status, list(tmp_path.iterdir())) == (404, [])
    with Client(service.url, "tsr_nonsense") as client, pytest.raises(ClientError) as stranger:
        client.submit({"steps": STEPS})
    assert stranger.value.code == "unauthorized"


def test_a_download_that_was_altered_is_refused(service: Service, tmp_path: Path) -> None:
    job = service.finished(content=b"right")
    (found,) = (path for path in service.files() if path.parent.parent.name == job)
    found.write_bytes(b"wrong")
    with Client(service.url) as client, pytest.raises(ClientError, match="digest"):
        client.download(job, "model.onnx", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nobody_there(tmp_path: Path) -> None:
    with Client(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(ClientError) as silence:
        client.job("job_x")
    assert (silence.value.code, silence.value.status) == ("unreachable", 0)


def test_a_dry_run_submits_nothing(service: Service) -> None:
    with Client(service.url) as client:
        with pytest.raises(ClientError) as refused:
            client.dry_run({"model": service.model(), "recipe": "small"})
        assert refused.value.code == "dataset_mismatch"
        planned = client.dry_run({"model": service.model(facts=model_facts(cost=COST)), "steps": STEPS})
        assert planned["artifacts"][0] == {"name": "model.safetensors", "format": "native"}
