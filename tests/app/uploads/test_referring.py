"""Models and datasets of bytes that were sent before, and who may know of them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from obstore.exceptions import GenericError

from app.contract.errors import ModelRejected
from tests.app.service import Service
from tests.app.uploads.resumable import VERSION, create, finished, patch, promise

SPEC = {
    "task": "image-classification",
    "input": {"shape": [1, 28, 28]},
    "architecture": {"layers": [{"type": "Flatten"}, {"type": "Linear", "in_features": 784, "out_features": 10}]},
}
NOBODY = "0" * 26


def fresh(word: str) -> tuple[bytes, str]:
    """Bytes that no other test has sent, and their name as a blob."""
    data = f"bytes of {word}".encode()
    return data, f"sha256:{hashlib.sha256(data).hexdigest()}"


def reject(service: Service, model: str) -> None:
    """As a worker does: the verdict, and then the bytes."""
    record = service.store.get_upload("local", model)
    service.store.finish_inspection(service.claim(model), ModelRejected("no").problem())
    key = service.blobs.blob_key(record.sha256)
    service.store.release_blob(record.sha256, lambda: service.blobs.delete(key))


def test_a_spec_and_a_name_come_with_the_reference(service: Service) -> None:
    data, blob = fresh("a spec")
    id = finished(service.http, data, promise(data, "sent.pt"))
    made = service.http.post("/v1/models", json={"upload": id, "spec": SPEC}).json()
    assert (made["filename"], made["spec"]["architecture"]) == ("sent.pt", SPEC["architecture"])
    made = service.http.post("/v1/models", json={"blob": blob, "filename": "a/b.pt", "spec": SPEC}).json()
    assert (made["filename"], made["sha256"], made["size_bytes"]) == ("b.pt", blob[7:], len(data))
    assert service.http.post("/v1/datasets", json={"blob": blob}).json()["filename"] == "upload"


def test_waiting_works_as_for_bytes(service: Service) -> None:
    data, _ = fresh("waiting")
    answer = service.http.post(
        "/v1/models", json={"upload": finished(service.http, data)}, headers={"Prefer": "wait=1"}
    )
    assert (answer.status_code, answer.headers["preference-applied"]) == (201, "wait=1")


REFUSED: dict[str, tuple[dict[str, Any], int, str, str | None]] = {
    "both": ({"upload": f"upl_{NOBODY}", "blob": "sha256:" + "0" * 64}, 422, "invalid_spec", ""),
    "null": ({"upload": None}, 422, "invalid_spec", ""),
    "a number": ({"upload": 7}, 422, "invalid_spec", "/upload"),
    "an unknown field": ({"upload": f"upl_{NOBODY}", "url": "file:///etc/passwd"}, 422, "invalid_spec", "/url"),
    "an upload that is not there": ({"upload": f"upl_{NOBODY}"}, 404, "not_found", "/upload"),
    "an upload that is a path": ({"upload": "../../etc/passwd"}, 404, "not_found", "/upload"),
    "a model": ({"upload": f"mdl_{NOBODY}"}, 404, "not_found", "/upload"),
    "a blob that is not there": ({"blob": "sha256:" + "0" * 64}, 404, "not_found", "/blob"),
    "a blob that is a path": ({"blob": "sha256:../../../etc/passwd"}, 404, "not_found", "/blob"),
    "another digest": ({"blob": "md5:" + "0" * 32}, 404, "not_found", "/blob"),
    "upper case": ({"blob": "sha256:" + "A" * 64}, 404, "not_found", "/blob"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("resource", ["models", "datasets"])
def test_refused(service: Service, resource: str, kind: str) -> None:
    document, status, code, pointer = REFUSED[kind]
    answer = service.http.post(f"/v1/{resource}", json=document)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json().get("pointer") == pointer


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"upl"', b'{"upload": "\\ud800"}', b"[" * 9000])
def test_json_that_is_no_reference(service: Service, body: bytes) -> None:
    answer = service.http.post("/v1/models", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404, 422)
    long = json.dumps({"upload": "x" * 70_000}).encode()
    answer = service.http.post("/v1/models", content=long, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_a_wrong_spec_is_named_and_costs_no_bytes(service: Service) -> None:
    data, _ = fresh("a wrong spec")
    id = finished(service.http, data)
    wrong = {"upload": id, "spec": SPEC | {"colour": "red"}}
    answer = service.http.post("/v1/models", json=wrong)
    assert (answer.status_code, answer.json()["pointer"]) == (422, "/spec/colour")
    assert service.http.post("/v1/models", json={"upload": id, "spec": SPEC}).status_code == 201


def test_an_unfinished_upload_is_not_used(service: Service) -> None:
    url = create(service.http, 10)
    patch(service.http, url, 0, b"four")
    answer = service.http.post("/v1/models", json={"upload": url.rpartition("/")[2]})
    assert (answer.status_code, answer.json()["code"]) == (409, "upload_unfinished")
    assert "4 of 10" in answer.json()["detail"]


def test_a_terminated_upload_leaves_its_models(service: Service) -> None:
    data, blob = fresh("a terminated upload")
    id = finished(service.http, data)
    model = service.http.post("/v1/models", json={"upload": id}).json()["id"]
    assert service.http.delete(f"/v1/uploads/{id}", headers=VERSION).status_code == 204
    assert service.blobs.exists(service.blobs.blob_key(blob[7:]))
    assert service.http.get(f"/v1/models/{model}").status_code == 200
    other, unused = fresh("an unused upload")
    service.http.delete(f"/v1/uploads/{finished(service.http, other)}", headers=VERSION)
    assert not service.blobs.exists(service.blobs.blob_key(unused[7:]))


def test_a_rejection_leaves_the_upload(service: Service) -> None:
    """With another spec the same bytes may pass: they need not be sent again while the upload lives."""
    data, blob = fresh("a rejection")
    id = finished(service.http, data)
    reject(service, service.http.post("/v1/models", json={"upload": id}).json()["id"])
    assert service.http.head(f"/v1/blobs/{blob}").status_code == 200
    assert service.http.post("/v1/models", json={"upload": id, "spec": SPEC}).status_code == 201


def test_looking_up_a_digest(service: Service) -> None:
    data, blob = fresh("a look-up")
    assert service.http.head(f"/v1/blobs/{blob}").status_code == 404
    model = service.http.post("/v1/models", content=data).json()["id"]
    found = service.http.head(f"/v1/blobs/{blob}")
    assert (found.status_code, found.headers["content-length"], found.content) == (200, str(len(data)), b"")
    reject(service, model)
    assert service.http.head(f"/v1/blobs/{blob}").status_code == 404
    assert service.http.post("/v1/models", json={"blob": blob}).status_code == 404
    for digest in (
        "sha256:",
        "sha256:" + "g" * 64,
        blob[7:],
        blob.upper(),
        f"{blob}0",
        "..",
        "%2e%2e%2f" * 9,
        "\u00e9",
    ):
        assert httpx.head(f"{service.url}/v1/blobs/{digest}").status_code == 404


@pytest.fixture(scope="module")
def accounts(guarded: Service) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    with (
        guarded.client(guarded.store.create_key("ann", "")[1]) as ann,
        guarded.client(guarded.store.create_key("bob", "")[1]) as bob,
    ):
        yield ann, bob


@pytest.mark.parametrize("way", ["models", "datasets", "uploads"])
def test_nobody_learns_of_the_bytes_of_others(accounts: tuple[httpx.Client, httpx.Client], way: str) -> None:
    ann, bob = accounts
    data, blob = fresh(f"Ann's {way}")
    if way == "uploads":
        finished(ann, data)
    else:
        ann.post(f"/v1/{way}", content=data)
    assert ann.head(f"/v1/blobs/{blob}").status_code == 200
    assert bob.head(f"/v1/blobs/{blob}").status_code == 404
    unknown = bob.post("/v1/models", json={"blob": "sha256:" + "0" * 64})
    known = bob.post("/v1/models", json={"blob": blob})
    assert known.status_code == 404
    assert known.json() == unknown.json()
    assert bob.post("/v1/datasets", content=data).status_code == 201  # who has the bytes may send them …
    assert bob.head(f"/v1/blobs/{blob}").status_code == 200  # … and knows of them from then on


def test_bytes_that_go_while_they_are_named_are_missed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the blob and the record a worker deletes it: no record of nothing is made."""
    data, blob = fresh("a deletion meanwhile")
    model = service.http.post("/v1/models", content=data).json()["id"]
    add_upload = type(service.store).add_upload

    def late(store: Any, *arguments: Any) -> Any:
        reject(service, model)
        return add_upload(store, *arguments)

    monkeypatch.setattr(type(service.store), "add_upload", late)
    gone = service.http.post("/v1/models", json={"blob": blob})
    assert (gone.status_code, gone.json()["code"], gone.json()["retryable"]) == (410, "blob_missing", True)


def test_bytes_that_are_sent_while_others_are_deleted_are_sent_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, blob = fresh("a collision")
    model = service.http.post("/v1/models", content=data).json()["id"]
    add_upload = type(service.store).add_upload

    def late(store: Any, *arguments: Any) -> Any:
        monkeypatch.undo()
        reject(service, model)
        return add_upload(store, *arguments)

    monkeypatch.setattr(type(service.store), "add_upload", late)
    refused = service.http.post("/v1/models", content=data)
    assert (refused.status_code, refused.json()["code"]) == (503, "service_unavailable")
    assert service.http.post("/v1/models", content=data).status_code == 201
    assert service.blobs.exists(service.blobs.blob_key(blob[7:]))


def test_rejections_and_uploads_of_the_same_bytes_at_once(service: Service) -> None:
    """Whatever the order: a record that is not rejected has its bytes."""
    data, blob = fresh("a storm")
    stop = threading.Event()
    errors: list[Any] = []

    def rejecting() -> None:
        while not stop.is_set():
            for item in service.store.list_uploads("local", "model", None, 5):
                if item.sha256 == blob[7:] and item.status == "inspecting":
                    reject(service, item.id)

    def sending(way: int) -> None:
        with httpx.Client(base_url=service.url) as http:
            for _ in range(15):
                if way:
                    id = finished(http, data)
                    answer = http.post("/v1/models", json={"upload": id})
                    http.delete(f"/v1/uploads/{id}", headers=VERSION)
                else:
                    answer = http.post("/v1/models", content=data)
                if answer.status_code not in (201, 503):
                    errors.append(answer.text)

    rejecter = threading.Thread(target=rejecting)
    senders = [threading.Thread(target=sending, args=(way,)) for way in (0, 1, 0)]
    for thread in (rejecter, *senders):
        thread.start()
    for thread in senders:
        thread.join(60)
    stop.set()
    rejecter.join(60)
    assert errors == []
    records = [item for item in service.store.list_uploads("local", "model", None, 100) if item.sha256 == blob[7:]]
    assert len(records) > 15
    kept = [item for item in records if item.status == "inspecting"]
    assert service.blobs.exists(service.blobs.blob_key(blob[7:])) == bool(kept)
    assert service.http.post("/v1/models", content=data).status_code == 201
    assert service.blobs.exists(service.blobs.blob_key(blob[7:]))


def test_a_blob_store_that_does_not_answer_is_told_as_such(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    data, blob = fresh("silence")
    service.http.post("/v1/models", content=data)

    def silence(*_: object) -> bool:
        raise GenericError("connection refused")

    monkeypatch.setattr("app.contract.blobs.base.Blobs.exists", silence)
    answer = service.http.post("/v1/models", json={"blob": blob})
    assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (503, "service_unavailable", True)
    assert "connection refused" not in answer.text
