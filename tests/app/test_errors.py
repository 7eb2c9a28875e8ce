"""Every error is a problem document, and the web layer knows a status for each."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

import app.errors
from app.contract.errors import JobFailed, LeaseLost, TersorError, problem_classes
from app.contract.store import JobStore
from tests.app.conftest import settings_in
from tests.app.service import Service, running

# What happens to jobs and inside the service is stored or logged, never raised to a client as it is.
INTERNAL = (JobFailed, LeaseLost)


def test_every_error_that_a_client_can_cause_has_a_status_below_500() -> None:
    for code, cls in problem_classes().items():
        if cls is TersorError or issubclass(cls, INTERNAL):
            continue
        made = cls("x", "y") if issubclass(cls, app.errors.InvalidParameter) else None
        status = app.errors.status_of(made or cls())
        assert status == 503 if code == "service_unavailable" else 400 <= status < 500, code


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/models/x/y", 404),
        ("GET", "/v1/models/mdl_%F0%28", 404),
        ("DELETE", "/v1/jobs", 405),
        ("PATCH", "/healthz", 405),
        ("DELETE", "/redoc", 405),
        ("POST", "/docs", 405),
        ("BREW", "/v1/models", 405),
    ],
)
def test_the_frameworks_own_errors(service: Service, method: str, path: str, status: int) -> None:
    answer = service.http.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == f"urn:tersor:problem:{problem['code']}"
    assert problem["status"] == status
    if path == "/v1/jobs":
        assert answer.headers["allow"] == "GET, POST"


def test_request_ids(service: Service) -> None:
    assert service.http.get("/healthz", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for odd in ("a b", "x" * 500, 'a"b'):
        made = service.http.get("/healthz", headers={"X-Request-Id": odd}).headers["x-request-id"]
        assert made != odd
        assert len(made) == 16
    assert service.http.get("/nothing").headers["x-content-type-options"] == "nosniff"


def test_a_broken_record_is_500_without_internals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(settings_in(tmp_path)) as own:
        model = own.model()
        _break(own.store, model)
        answer = httpx.get(f"{own.url}/v1/models/{model}", headers={"X-Request-Id": "find-me"})
        assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
        assert answer.headers["x-request-id"] == "find-me"
        assert "odd" not in answer.text
        assert own.http.get("/healthz").status_code == 200
    assert "'odd' is not a valid UploadStatus" in caplog.text


def test_a_database_that_does_not_answer_is_503(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as own:
        with own.store._write() as connection:
            connection.execute(text("ALTER TABLE jobs RENAME TO elsewhere"))
        answer = own.http.get("/v1/jobs")
        assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (
            503,
            "service_unavailable",
            True,
        )
        assert answer.headers["retry-after"] == "1"
        assert "jobs" not in answer.json()["detail"]


def _break(store: JobStore, model: str) -> None:
    with store._write() as connection:
        connection.execute(text("UPDATE uploads SET status = 'odd' WHERE id = :id"), {"id": model})
