"""Uploads: both ways in, streamed and hashed, and nothing kept of what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from app.contract.errors import ModelRejected
from app.uploads.receiving import safe_filename
from tests.app.service import HANG_SECONDS, Service
from tests.contract.facts import model_facts

SPEC = {
    "task": "image-classification",
    "input": {"shape": [1, 28, 28]},
    "architecture": {"layers": [{"type": "Flatten"}, {"type": "Linear", "in_features": 784, "out_features": 10}]},
}
OCTETS = {"Content-Type": "application/octet-stream"}


def test_raw_body(service: Service) -> None:
    body = b"raw model" * 1000
    answer = service.http.post(
        "/v1/models", params={"filename": "a.safetensors", "spec": json.dumps(SPEC)}, content=body, headers=OCTETS
    )
    assert answer.status_code == 201
    model = answer.json()
    assert answer.headers["location"] == f"/v1/models/{model['id']}"
    assert model["sha256"] == hashlib.sha256(body).hexdigest()
    assert (model["size_bytes"], model["filename"], model["status"]) == (len(body), "a.safetensors", "inspecting")
    assert model["spec"]["architecture"] == SPEC["architecture"]
    assert service.http.get(answer.headers["location"]).json() == model
    key = service.blobs.blob_key(model["sha256"])
    assert service.blobs.size(key) == len(body)


@pytest.mark.parametrize("spec_first", [True, False])
def test_form(service: Service, spec_first: bool) -> None:
    body = b"\r\n--boundary-like\r\n" * 5000 + bytes(range(256))
    file = ("file", ("b.safetensors", body, "application/octet-stream"))
    spec = ("spec", (None, json.dumps(SPEC), "application/json"))
    answer = service.http.post("/v1/models", files=[spec, file] if spec_first else [file, spec])
    assert answer.status_code == 201, answer.text
    assert answer.json()["sha256"] == hashlib.sha256(body).hexdigest()
    assert answer.json()["filename"] == "b.safetensors"
    assert answer.json()["spec"]["task"] == "image-classification"


@pytest.mark.parametrize("spec", [{"split": False}, {"split": {"validation": 0.2, "seed": 7}}])
def test_a_dataset_says_how_it_is_divided(service: Service, spec: dict[str, Any]) -> None:
    answer = service.http.post("/v1/datasets", params={"spec": json.dumps(spec)}, content=b"data", headers=OCTETS)
    assert answer.status_code == 201
    assert answer.json()["spec"] == spec


def test_shares_that_make_no_sense_are_refused_at_once(service: Service) -> None:
    spec = json.dumps({"split": {"validation": 2}})
    answer = service.http.post("/v1/datasets", params={"spec": spec}, content=b"data", headers=OCTETS)
    assert (answer.status_code, answer.json()["pointer"]) == (422, "/spec/split/validation")


def test_the_same_bytes_are_one_blob(service: Service) -> None:
    first = service.http.post("/v1/datasets", content=b"same", headers=OCTETS).json()
    files = service.files()
    second = service.http.post("/v1/models", content=b"same", headers=OCTETS).json()
    assert first["sha256"] == second["sha256"]
    assert service.files() == files


def form(*parts: tuple[str, bytes], end: bytes = b"--x--\r\n") -> dict[str, Any]:
    """A multipart body by hand."""
    body = b"".join(
        b"--x\r\n" + f"Content-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n" for head, data in parts
    )
    return {"content": body + end, "headers": {"Content-Type": "multipart/form-data; boundary=x"}}


FILE = ('name="file"; filename="m"', b"bytes")
REFUSED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "empty": ({"content": b""}, 400, "invalid_request", "empty"),
    "empty file in a form": (form(('name="file"', b"")), 400, "invalid_request", "empty"),
    "too long by its own word": ({"content": b"x" * ((1 << 20) + 1)}, 413, "upload_too_large", "1048576"),
    "JSON that names nothing": ({"json": {}}, 422, "invalid_spec", "`upload` or `blob`"),
    "multipart/mixed": (
        {"content": b"x", "headers": {"Content-Type": "multipart/mixed; boundary=x"}},
        415,
        "unsupported_media_type",
        "form-data",
    ),
    "no boundary": (
        {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
        415,
        "unsupported_media_type",
        "boundary",
    ),
    "endless boundary": (
        {"content": b"x", "headers": {"Content-Type": f"multipart/form-data; boundary={'b' * 999}"}},
        415,
        "unsupported_media_type",
        "oundary",
    ),
    "gzip": (
        {"content": b"x", "headers": OCTETS | {"Content-Encoding": "gzip"}},
        415,
        "unsupported_media_type",
        "gzip",
    ),
    "not a form": (
        {"content": b"hello", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        400,
        "invalid_request",
        "multipart",
    ),
    "form without an end": (form(FILE, end=b""), 400, "invalid_request", "closing boundary"),
    "form without a file": (form(('name="spec"', b"{}")), 400, "invalid_request", "`file`"),
    "two files": (form(FILE, FILE), 400, "invalid_request", "twice"),
    "unknown part": (form(FILE, ('name="colour"', b"red")), 400, "invalid_request", "colour"),
    "large spec": (form(('name="spec"', b" " * 70_000), FILE), 413, "upload_too_large", "65536"),
    "spec that is no JSON": (form(FILE, ('name="spec"', b"{")), 400, "invalid_request", "`spec`"),
    "deep spec": (form(FILE, ('name="spec"', b"[" * 60_000)), 400, "invalid_request", "recursion"),
    "spec that is no object": (form(FILE, ('name="spec"', b"[1]")), 422, "invalid_spec", "spec"),
    "wrong digest": (
        {"content": b"x", "headers": OCTETS | {"Repr-Digest": f"sha-256=:{base64.b64encode(b'0' * 32).decode()}:"}},
        400,
        "upload_incomplete",
        "SHA-256",
    ),
    "digest that is none": (
        {"content": b"x", "headers": OCTETS | {"Content-Digest": "sha-256=:eA==:"}},
        400,
        "invalid_parameter",
        "32 bytes",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("resource", ["models", "datasets"])
def test_refused(service: Service, resource: str, kind: str) -> None:
    request, status, code, word = REFUSED[kind]
    before = service.files()
    answer = service.http.post(f"/v1/{resource}", **request)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert word in answer.json()["detail"]
    assert service.files() == before


def test_a_stream_that_passes_the_limit(service: Service) -> None:
    before = service.files()

    def endless() -> Any:
        for _ in range(100):
            yield b"x" * 65_536

    answer = service.http.post("/v1/models", content=endless(), headers=OCTETS)
    assert (answer.status_code, answer.json()["code"]) == (413, "upload_too_large")
    assert service.files() == before


def test_a_client_that_goes_away_leaves_nothing(service: Service) -> None:
    before = service.files()
    port = int(service.url.rpartition(":")[2])
    for kind in ("application/octet-stream", "multipart/form-data; boundary=x"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = "POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n"
            head += f"Content-Type: {kind}\r\n\r\n"
            part = 'Content-Disposition: form-data; name="file"\r\n\r\n' if "form" in kind else ""
            connection.sendall(head.encode() + b"--x\r\n" + part.encode() + b"x" * 400_000)
            deadline = time.monotonic() + HANG_SECONDS
            while service.files() == before and time.monotonic() < deadline:
                time.sleep(0.005)
            assert service.files() != before, "the upload never began"
        deadline = time.monotonic() + HANG_SECONDS
        while service.files() != before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service.files() == before


def test_a_right_digest_is_accepted(service: Service) -> None:
    digest = base64.b64encode(hashlib.sha256(b"abc").digest()).decode()
    headers = OCTETS | {"Repr-Digest": f"md5=:xx:, sha-256=:{digest}:", "Content-Digest": f"sha-256=:{digest}:"}
    assert service.http.post("/v1/models", content=b"abc", headers=headers).status_code == 201


def layers(*found: dict[str, Any]) -> dict[str, Any]:
    return SPEC | {"architecture": {"layers": list(found)}}


CONV = {"type": "Conv2d", "in_channels": 1, "out_channels": 1}
RELU = {"type": "ReLU"}


@pytest.mark.parametrize(
    ("spec", "pointer"),
    [
        ({"colour": "red"}, "/spec/colour"),
        (layers({"type": "Lambda"}), "/spec/architecture/layers/0"),
        (layers(RELU, {"type": "Linear", "in_features": 3}), "/spec/architecture/layers/1/out_features"),
        (layers(RELU, CONV | {"kernel_size": [3, 0]}), "/spec/architecture/layers/1/kernel_size/1"),
        (layers(CONV | {"kernel_size": 0}), "/spec/architecture/layers/0/kernel_size"),
        ({"task": "image-classification", "architecture": SPEC["architecture"]}, "/spec"),
    ],
)
def test_a_wrong_spec_is_named(service: Service, spec: dict[str, Any], pointer: str) -> None:
    before = service.files()
    for request in (
        {"params": {"spec": json.dumps(spec)}, "content": b"bytes"},
        {"files": {"file": ("m", b"bytes")}, "data": {"spec": json.dumps(spec)}},
    ):
        answer = service.http.post("/v1/models", **request)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_spec")
        assert [fault["pointer"] for fault in answer.json()["errors"]] == [pointer]
        assert answer.json()["pointer"] == pointer
    assert service.files() == before


def test_waiting_for_the_inspection(service: Service) -> None:
    answer = service.http.post("/v1/models", content=b"w", headers=OCTETS | {"Prefer": "wait=1"})
    assert (answer.status_code, answer.headers["preference-applied"]) == (201, "wait=1")
    model = answer.json()["id"]
    answer = service.http.get(f"/v1/models/{model}", headers={"Prefer": "wait=1"})
    assert answer.json()["status"] == "inspecting"
    assert answer.headers["preference-applied"] == "wait=1"
    claim = service.claim(model)
    with httpx.Client(base_url=service.url) as http:
        verdict = threading.Timer(0.3, service.store.finish_inspection, (claim, model_facts()))
        verdict.start()
        answer = http.get(f"/v1/models/{model}", headers={"Prefer": "respond-async, wait=30"}, timeout=HANG_SECONDS)
        verdict.join()
    found = answer.json()
    assert (found["status"], found["parameters"], found["format"]) == ("ready", 7850, "architecture")


def test_a_rejected_upload_says_why(service: Service) -> None:
    model = service.http.post("/v1/models", content=b"w", headers=OCTETS).json()["id"]
    service.store.finish_inspection(service.claim(model), ModelRejected("It is a pickle.").problem())
    found = service.http.get(f"/v1/models/{model}").json()
    assert (found["status"], found["problem"]["code"]) == ("rejected", "model_rejected")
    assert [m["id"] for m in service.http.get("/v1/models?status=rejected&limit=1").json()["items"]] == [model]
    refused = service.http.post("/v1/jobs", json={"model": model, "recipe": "int8"})
    assert (refused.status_code, refused.json()["pointer"]) == (422, "/model")
    assert "pickle" in refused.json()["detail"]


def test_a_dataset_shows_its_splits(service: Service) -> None:
    found = service.http.get(f"/v1/datasets/{service.dataset('train', 'test')}").json()
    assert (found["kind"], found["splits"]["train"]["samples"]) == ("arrays", 100)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\models\\m.onnx", "m.onnx"),
        ("a\r\nSet-Cookie: x\0.pt", "aSet-Cookie: x.pt"),
        ("..", "upload"),
        (None, "upload"),
        ("/", "upload"),
        ("é" * 300, "é" * 255),
    ],
)
def test_filenames(given: str | None, kept: str) -> None:
    assert safe_filename(given) == kept


def test_a_filename_in_a_form_is_no_path(service: Service) -> None:
    answer = service.http.post("/v1/models", **form(('name="file"; filename="../../x\x00y.pt"', b"bytes")))
    assert (answer.status_code, answer.json()["filename"]) == (201, "xy.pt")
