"""Jobs over HTTP: what is refused and where, replays, polling, waiting, cancelling, reports."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from app.contract.errors import TimedOut
from tests.app.service import HANG_SECONDS, STEPS, Service
from tests.contract.facts import COST, dataset_facts, model_facts, split_facts

NOBODY = "mdl_" + "0" * 26
TRAINED = {"technique": "prune", "sparsity": 0.5, "training": {"epochs": 1}}


def test_a_job_is_accepted(service: Service) -> None:
    model, dataset = service.model(), service.dataset()
    spec = {"model": model, "dataset": dataset, "recipe": "small", "seed": 7, "metadata": {"mine": [1, None]}}
    answer = service.http.post("/v1/jobs", json=spec)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert answer.headers["retry-after"] == "1"
    assert (job["state"], job["progress"], job["seed"], job["metadata"]) == ("queued", 0, 7, {"mine": [1, None]})
    assert job["queue_position"] >= 1
    assert [step["technique"] for step in job["steps"]] == ["prune", "finetune", "quantize"]
    assert job["steps"][0]["scope"] == "global"  # every default is filled in
    assert service.http.get(answer.headers["location"]).json() == job


GARBLED: list[tuple[bytes, int, str | None]] = [
    (b"", 400, None),
    (b"{", 400, None),
    (b"[1]", 422, None),
    (b'"text"', 422, None),
    (b"null", 422, None),
    (b'{"model": "mdl_\xff"}', 400, None),
    (b'{"metadata": {"a": "\\ud800"}}', 400, None),
    (b'{"seed": NaN}', 400, None),
    (b'{"seed": ' + b"1" * 5000 + b"}", 400, None),
    (b"[" * 60_000, 400, None),
    (b'{"a":' * 10_000, 400, None),
    (b'{"model": 7, "recipe": "int8"}', 422, "/model"),
    (b'{"recipe": "int8"}', 422, "/model"),
    (b'{"model": "mdl_x", "recipe": "int8"}', 422, "/model"),
    (b'{"model": "%s", "recipe": "int8", "seed": 1e400}' % NOBODY.encode(), 400, None),
    (b'{"model": "%s", "recipe": "int8", "seed": -1}' % NOBODY.encode(), 422, "/seed"),
    (b'{"model": "%s", "recipe": "int8"}' % NOBODY.encode(), 422, "/model"),
    (b'{"model": "%s", "recipe": "best"}' % NOBODY.encode(), 422, "/recipe"),
    (b'{"model": "%s", "recipe": "int8", "speed": 9}' % NOBODY.encode(), 422, "/speed"),
    (b'{"model": "%s", "recipe": "int8", "a/b~c": 9}' % NOBODY.encode(), 422, "/a~1b~0c"),
    (b'{"model": "%s"}' % NOBODY.encode(), 422, None),
    (b'{"model": "%s", "steps": []}' % NOBODY.encode(), 422, "/steps"),
    (b'{"model": "%s", "steps": [{"technique": "magic"}]}' % NOBODY.encode(), 422, "/steps/0"),
    (b'{"model": "%s", "steps": [{}]}' % NOBODY.encode(), 422, "/steps/0"),
    (b'{"model": "%s", "steps": [{"technique": "prune"}]}' % NOBODY.encode(), 422, "/steps/0"),
    (b'{"model": "%s", "steps": [{"technique": "prune", "sparsity": 2}]}' % NOBODY.encode(), 422, "/steps/0/sparsity"),
]


@pytest.mark.parametrize(("body", "status", "pointer"), GARBLED)
def test_a_garbled_job_is_a_problem(service: Service, body: bytes, status: int, pointer: str | None) -> None:
    answer = service.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json().get("pointer") or None) == (status, pointer), answer.text
    assert len(answer.json()["detail"]) > 15


def test_metadata_as_deep_as_json_is_read_comes_back(service: Service) -> None:
    deep: Any = 1
    for _ in range(150):
        deep = [deep]
    job = service.job(metadata={"deep": deep})
    assert service.http.get(f"/v1/jobs/{job['id']}").json()["metadata"] == {"deep": deep}


def test_every_fault_is_listed(service: Service) -> None:
    spec = {"model": 1, "seed": -1, "steps": [{"technique": "quantize", "method": "x", "calibration": {"samples": 0}}]}
    problem = service.http.post("/v1/jobs", json=spec).json()
    assert {fault["pointer"] for fault in problem["errors"]} == {
        "/model",
        "/seed",
        "/steps/0/method",
        "/steps/0/calibration/samples",
    }
    assert "it is 1" in problem["detail"]
    assert "3 more" in problem["detail"]


def test_other_bodies(service: Service) -> None:
    refused = service.http.post("/v1/jobs", content=b"{}", headers={"Content-Type": "text/plain"})
    assert (refused.status_code, refused.json()["code"]) == (415, "unsupported_media_type")
    large = {"content": b" " * 70_000, "headers": {"Content-Type": "application/json"}}
    assert service.http.post("/v1/jobs", **large).status_code == 413  # type: ignore[arg-type]
    large["content"] = iter([b" " * 7000] * 10)
    assert service.http.post("/v1/jobs", **large).status_code == 413  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dataset", "steps", "code", "pointer"),
    [
        (None, [TRAINED], "dataset_mismatch", "/dataset"),
        (("test",), [*STEPS, TRAINED], "dataset_mismatch", "/steps/1"),
        (("train",), [{"technique": "quantize"}, *STEPS], "order_refused", "/steps/1"),
    ],
)
def test_what_does_not_fit_is_refused(
    service: Service, dataset: tuple[str, ...] | None, steps: list[Any], code: str, pointer: str
) -> None:
    spec = {"model": service.model(), "steps": steps}
    if dataset is not None:
        spec["dataset"] = service.dataset(*dataset)
    answer = service.http.post("/v1/jobs", json=spec)
    assert (answer.status_code, answer.json()["code"], answer.json()["pointer"]) == (422, code, pointer)


def test_a_dataset_of_other_classes_is_refused(service: Service) -> None:
    facts = dataset_facts("train", splits={"train": split_facts(target_max=10)})
    spec = {"model": service.model(facts=model_facts()), "dataset": service.dataset(facts=facts), "recipe": "int8"}
    answer = service.http.post("/v1/jobs", json=spec)
    assert (answer.status_code, answer.json()["pointer"]) == (422, "/dataset")
    assert "10 classes" in answer.json()["detail"]


def taught(teacher: str) -> list[dict[str, Any]]:
    return [{"technique": "distill", "training": {"distill": {"teacher": ["uploaded", teacher]}}}]


POINTER = "/steps/0/training/distill/teacher/1"


def test_other_models_are_the_accounts_own_and_fit(service: Service) -> None:
    teacher = service.model()
    job = service.job(dataset=service.dataset("train"), steps=taught(teacher))
    assert job["steps"][0]["training"]["distill"]["teacher"] == ["uploaded", teacher]
    spec = {"model": service.model(), "dataset": service.dataset("train")}
    unknown = service.http.post("/v1/jobs", json=spec | {"steps": taught("mdl_" + "0" * 26)})
    assert (unknown.status_code, unknown.json()["code"], unknown.json()["pointer"]) == (422, "invalid_spec", POINTER)
    assert "another account" in unknown.json()["detail"]
    other = service.model(facts=model_facts(classes=4, labels=None))
    misfit = service.http.post("/v1/jobs", json=spec | {"steps": taught(other)})
    assert (misfit.status_code, misfit.json()["code"], misfit.json()["pointer"]) == (422, "models_mismatch", POINTER)


def test_a_dry_run_waits_for_every_model(service: Service) -> None:
    teacher = service.http.post("/v1/models", content=b"x").json()["id"]
    spec = {"model": service.model(facts=model_facts(cost=COST)), "dataset": service.dataset("train")}
    planned = service.http.post("/v1/jobs?dry_run=true", json=spec | {"steps": taught(teacher)})
    assert (planned.status_code, planned.json()["code"], planned.json()["pointer"]) == (
        409,
        "still_inspecting",
        POINTER,
    )
    ready = service.model(facts=model_facts(cost=COST))
    planned = service.http.post("/v1/jobs?dry_run=true", json=spec | {"steps": taught(ready)})
    assert planned.status_code == 200


def test_a_job_may_wait_for_an_inspection(service: Service) -> None:
    model = service.http.post("/v1/models", content=b"x").json()["id"]
    job = service.job(
        model=model, dataset=service.dataset("train"), steps=[TRAINED]
    )  # whether it fits is not known yet
    assert job["state"] == "queued"
    refused = service.http.post("/v1/jobs", json={"model": model, "steps": [TRAINED]})
    assert (refused.status_code, refused.json()["pointer"]) == (422, "/dataset")  # no model trains without data


def test_an_idempotency_key_gives_the_same_job(service: Service) -> None:
    model, key = service.model(), {"Idempotency-Key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}
    first = service.http.post("/v1/jobs", json={"model": model, "steps": STEPS}, headers=key)
    again = service.http.post("/v1/jobs", json={"steps": STEPS, "model": model, "seed": 0}, headers=key)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    other = service.http.post("/v1/jobs", json={"model": model, "steps": STEPS, "seed": 1}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


def test_a_replay_wins_over_what_was_learned_since(service: Service) -> None:
    """The model was being inspected at first; that the job cannot work is then no reason to deny that it exists."""
    model, key = service.http.post("/v1/models", content=b"x").json()["id"], {"Idempotency-Key": "replay"}
    facts = dataset_facts("train", splits={"train": split_facts(target_max=10)})
    spec = {"model": model, "dataset": service.dataset(facts=facts), "steps": [TRAINED]}
    first = service.http.post("/v1/jobs", json=spec, headers=key)
    service.store.finish_inspection(service.claim(model), model_facts())
    assert service.http.post("/v1/jobs", json=spec, headers=key).json()["id"] == first.json()["id"]
    assert service.http.post("/v1/jobs", json=spec).status_code == 422


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "caf\u00e9"])
def test_a_bad_idempotency_key(service: Service, key: str) -> None:
    answer = service.http.post("/v1/jobs", json={}, headers={"Idempotency-Key": key.encode("latin-1")})
    assert (answer.status_code, answer.json()["parameter"]) == (400, "Idempotency-Key")


def test_polling_with_a_tag(service: Service) -> None:
    path = f"/v1/jobs/{service.job()['id']}"
    tag = service.http.get(path).headers["etag"]
    assert tag.startswith('"')
    for known in (tag, f'"other", W/{tag}', "*"):
        same = service.http.get(path, headers={"If-None-Match": known})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    claim = service.claim(path.rpartition("/")[2])
    service.store.heartbeat(claim, 60, 0.25, "prune")
    changed = service.http.get(path, headers={"If-None-Match": tag})
    assert (changed.status_code, changed.json()["progress"], changed.json()["step"]) == (200, 0.25, "prune")


def test_waiting_for_a_change(service: Service) -> None:
    job = service.job()["id"]
    claim = service.claim(job)
    tag = service.http.get(f"/v1/jobs/{job}").headers["etag"]
    for headers in ({"If-None-Match": tag}, {}):
        change = threading.Timer(0.2, service.store.heartbeat, (claim, 60, 0.5, "prune"))
        change.start()
        answer = service.http.get(f"/v1/jobs/{job}", headers={"Prefer": "wait=30", **headers})
        change.join()
        assert (answer.status_code, answer.json()["progress"]) == (200, 0.5)
        assert answer.headers["preference-applied"] == "wait=30"
        assert answer.headers["etag"] != tag
    tag = answer.headers["etag"]
    same = service.http.get(f"/v1/jobs/{job}", headers={"Prefer": "wait=1", "If-None-Match": tag})
    assert (same.status_code, same.headers["preference-applied"]) == (304, "wait=1")
    old = service.http.get(f"/v1/jobs/{job}", headers={"Prefer": "wait=60", "If-None-Match": '"older"'})
    assert old.status_code == 200  # it has changed already: no reason to wait


def test_a_finished_job_does_not_hold(service: Service) -> None:
    job = service.job()["id"]
    service.store.fail_job(service.claim(job), TimedOut().problem())
    answer = service.http.get(f"/v1/jobs/{job}", headers={"Prefer": "wait=60"})
    assert (answer.json()["state"], answer.json()["error"]["code"]) == ("failed", "timeout")


def test_many_who_wait_hold_nobody_up(service: Service) -> None:
    """More than there are threads wait; another request is answered all the same."""
    job = service.job()["id"]
    waiting = [
        threading.Thread(target=service.http.get, args=(f"/v1/jobs/{job}",), kwargs={"headers": {"Prefer": "wait=20"}})
        for _ in range(60)
    ]
    for thread in waiting:
        thread.start()
    try:
        time.sleep(0.5)
        with service.client() as other:
            assert other.get("/healthz", timeout=10).status_code == 200
            assert other.get("/v1/techniques", timeout=10).status_code == 200
            assert other.post(f"/v1/jobs/{job}/cancel", timeout=10).json()["state"] == "cancelled"
    finally:
        for thread in waiting:
            thread.join(HANG_SECONDS)
    assert not any(thread.is_alive() for thread in waiting)  # the change was told to all


def test_cancelling(service: Service) -> None:
    queued = service.job()["id"]
    first = service.http.post(f"/v1/jobs/{queued}/cancel")
    assert (first.status_code, first.json()["state"]) == (200, "cancelled")
    assert service.http.post(f"/v1/jobs/{queued}/cancel").status_code == 200
    running = service.job()["id"]
    claim = service.claim(running)
    asked = service.http.post(f"/v1/jobs/{running}/cancel")
    assert (asked.status_code, asked.json()["cancel_requested"]) == (202, True)
    service.store.cancel_job(claim)
    assert service.http.get(f"/v1/jobs/{running}").json()["state"] == "cancelled"
    refused = service.http.post(f"/v1/jobs/{service.finished()}/cancel")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert "succeeded" in refused.json()["detail"]


def test_the_report(service: Service) -> None:
    done = service.finished()
    report = service.http.get(f"/v1/jobs/{done}/report")
    assert (report.status_code, report.json()["uploaded"]["runtime"]) == (200, "torch")
    assert service.http.get(f"/v1/jobs/{done}").json()["warnings"] == ["no smaller"]
    early = service.http.get(f"/v1/jobs/{service.job()['id']}/report")
    assert (early.status_code, early.json()["code"]) == (409, "conflict")
    assert "queued" in early.json()["detail"]


def test_the_sensitivity_of_layers_is_drawn_where_it_was_measured(service: Service) -> None:
    picture = service.http.get(f"/v1/jobs/{service.finished()}/report/sensitivity.svg")
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/svg+xml")
    assert picture.text.count("<polyline") == 2
    assert "2.weight" in picture.text
    none = service.http.get(f"/v1/jobs/{service.finished(steps=())}/report/sensitivity.svg")
    assert (none.status_code, none.json()["code"]) == (404, "not_found")
    assert "scope auto" in none.json()["detail"]


@pytest.mark.parametrize("id", ["job_" + "0" * 26, "nonsense", "job_%00", "mdl_" + "0" * 26])
def test_no_such_job(service: Service, id: str) -> None:
    for answer in (service.http.get(f"/v1/jobs/{id}"), service.http.get(f"/v1/jobs/{id}/report")):
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_a_dry_run_says_what_a_job_would_do_and_does_not_do_it(service: Service) -> None:
    http = service.http
    model, dataset = service.model(facts=model_facts(cost=COST)), service.dataset("train", "test")
    before = [job["id"] for job in http.get("/v1/jobs").json()["items"]]
    answer = http.post("/v1/jobs?dry_run=true", json={"model": model, "dataset": dataset, "recipe": "small"})
    assert answer.status_code == 200, answer.text
    planned = answer.json()
    assert [step["technique"] for step in planned["steps"]] == ["prune", "finetune", "quantize"]
    assert planned["steps"][0]["training"]["epochs"] == 4
    assert planned["artifacts"] == [
        {"name": "model.safetensors", "format": "native"},
        {"name": "model.onnx", "format": "onnx"},
    ]
    assert planned["estimate"]["seconds"] > 0
    assert planned["estimate"]["memory_bytes"] > COST.training_bytes
    assert [job["id"] for job in http.get("/v1/jobs").json()["items"]] == before


def test_a_dry_run_refuses_what_a_job_would_be_refused_for(service: Service) -> None:
    http = service.http
    model = service.model(facts=model_facts(cost=COST))
    wrong = http.post("/v1/jobs?dry_run=true", json={"model": model, "steps": [TRAINED]})
    assert (wrong.status_code, wrong.json()["code"]) == (422, "dataset_mismatch")
    fresh = http.post("/v1/models?filename=m.safetensors", content=b"weights").json()["id"]
    waiting = http.post("/v1/jobs?dry_run=true", json={"model": fresh, "steps": STEPS})
    assert (waiting.status_code, waiting.json()["code"]) == (409, "still_inspecting")
    assert (waiting.json()["pointer"], waiting.json()["retryable"]) == ("/model", True)
    assert http.post("/v1/jobs?dry_run=perhaps", json={"model": model, "steps": STEPS}).status_code == 400
