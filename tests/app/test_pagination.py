"""Lists in pages."""

from __future__ import annotations

import base64

import pytest

from tests.app.service import Service


@pytest.mark.parametrize("resource", ["models", "datasets", "jobs"])
def test_walking_a_list(guarded: Service, resource: str) -> None:
    _, key = guarded.store.create_key(f"pages of {resource}", "test")
    with guarded.client(key) as http:
        made = []
        for _ in range(5):
            if resource == "jobs":
                made.append(guarded.job(http)["id"])
            else:
                made.append(http.post(f"/v1/{resource}", content=b"x").json()["id"])
        seen, cursor, pages = [], None, 0
        while pages == 0 or cursor is not None:
            page = http.get(f"/v1/{resource}", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
            seen += [item["id"] for item in page["items"]]
            cursor, pages = page["next"], pages + 1
        assert (seen, pages) == (made[::-1], 3)
        assert http.get(f"/v1/{resource}", params={"limit": 5}).json()["next"] is None


def test_jobs_by_state(guarded: Service) -> None:
    _, key = guarded.store.create_key("states", "test")
    with guarded.client(key) as http:
        queued, running = guarded.job(http)["id"], guarded.job(http)["id"]
        guarded.claim(running)
        assert [job["id"] for job in http.get("/v1/jobs?state=queued").json()["items"]] == [queued]
        assert [job["id"] for job in http.get("/v1/jobs?state=running").json()["items"]] == [running]


@pytest.mark.parametrize("resource", ["models", "datasets", "jobs"])
@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("cursor=nonsense", "cursor"),
        ("cursor=%00", "cursor"),
        ("cursor=", "cursor"),
        ("cursor=" + base64.urlsafe_b64encode(b"key_" + b"0" * 26).decode(), "cursor"),
        ("cursor=" + "x" * 1000, "cursor"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=many", "limit"),
    ],
)
def test_a_bad_query_names_its_parameter(service: Service, resource: str, query: str, parameter: str) -> None:
    answer = service.http.get(f"/v1/{resource}?{query}")
    assert (answer.status_code, answer.json()["parameter"]) == (400, parameter)


def test_a_bad_state(service: Service) -> None:
    assert service.http.get("/v1/jobs?state=odd").json()["parameter"] == "state"
    assert service.http.get("/v1/models?status=odd").json()["parameter"] == "status"
