"""API keys at the edge: who gets in, and that nobody sees what is another's."""

from __future__ import annotations

import pytest

from tests.app.service import STEPS, Service


def test_without_a_key(guarded: Service, service: Service) -> None:
    for path in ("/v1/models", "/v1/jobs", "/v1/techniques", "/v1/recipes"):
        refused = guarded.http.get(path)
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
        assert refused.headers["www-authenticate"] == "Bearer"
        assert service.http.get(path).status_code == 200
    assert guarded.http.post("/v1/models", content=b"x" * (2 << 20)).status_code == 401


@pytest.mark.parametrize(
    "header", ["Bearer", "Bearer tsr_x", "Basic dXNlcjpwYXNz", "Bearer " + "x" * 1000, "", "tsr_1"]
)
def test_a_wrong_key_is_refused_even_where_none_is_needed(guarded: Service, service: Service, header: str) -> None:
    for each in (guarded, service):
        assert each.http.get("/v1/models", headers={"Authorization": header}).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Host": ""},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"X-Forwarded-For": "203.0.113.7"},
        {"Forwarded": "for=203.0.113.7"},
        {"Host": "[::1"},
    ],
)
def test_loopback_without_a_key_is_for_this_machine_alone(service: Service, headers: dict[str, str]) -> None:
    """A page in a browser or a proxy can send requests to loopback; they need a key."""
    refused = service.http.get("/v1/models", headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
    _, key = service.store.create_key("anyone", "")
    assert service.http.get("/v1/models", headers=headers | {"Authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "[::1]:8000", "127.8.8.8"])
def test_loopback_by_any_of_its_names(service: Service, host: str) -> None:
    for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}"}):
        assert service.http.get("/v1/models", headers=headers).status_code == 200


def test_a_revoked_key(guarded: Service) -> None:
    record, key = guarded.store.create_key("fleeting", "test")
    with guarded.client(key) as http:
        assert http.get("/v1/models").status_code == 200
        guarded.store.revoke_key(record.id)
        assert http.get("/v1/models").status_code == 401


def test_accounts_do_not_see_each_other(guarded: Service) -> None:
    (_, mine), (_, theirs) = guarded.store.create_key("mine", ""), guarded.store.create_key("theirs", "")
    with guarded.client(mine) as me, guarded.client(theirs) as them:
        model, dataset, job = guarded.model(me), guarded.dataset(http=me), guarded.finished(me)
        paths = [f"/v1/models/{model}", f"/v1/datasets/{dataset}"]
        paths += [f"/v1/jobs/{job}{end}" for end in ("", "/report", "/artifacts", "/artifacts/model.onnx")]
        for path in paths:
            assert (me.get(path).status_code, them.get(path).status_code) == (200, 404), path
        assert them.post(f"/v1/jobs/{job}/cancel").status_code == 404
        for spec in ({"model": model}, {"model": guarded.model(them), "dataset": dataset}):
            refused = them.post("/v1/jobs", json=spec | {"steps": STEPS})
            assert (refused.status_code, refused.json()["code"]) == (422, "invalid_spec")
            assert refused.json()["pointer"] == f"/{list(spec)[-1]}"
        for resource in ("datasets", "jobs"):
            assert them.get(f"/v1/{resource}").json()["items"] == []


def test_what_needs_no_key(guarded: Service) -> None:
    for path in ("/healthz", "/metrics", "/openapi.json"):
        assert guarded.http.get(path).status_code == 200
    assert guarded.http.get("/readyz").status_code in (200, 503)
