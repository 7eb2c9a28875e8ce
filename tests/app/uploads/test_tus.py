"""The tus protocol as it is written, in a folder and in an object store; every answer is held against OpenAPI."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import pytest

from tests.app.conftest import settings_in
from tests.app.service import Service, running
from tests.app.uploads.resumable import OCTETS, VERSION, checksum, create, finished, metadata, offset_of, patch, promise

DATA = bytes(range(256)) * 300


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose bytes lie in an object store."""
    with running(settings_in(tmp_path_factory.mktemp("objects"), blobs_url="memory:///")) as found:
        yield found


@pytest.fixture(params=["folder", "objects"])
def tus(request: pytest.FixtureRequest) -> Service:
    found: Service = request.getfixturevalue("service" if request.param == "folder" else "objects")
    return found


def test_what_is_supported(tus: Service) -> None:
    answer = tus.http.options("/v1/uploads")
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["tus-version"] == answer.headers["tus-resumable"] == "1.0.0"
    assert answer.headers["tus-max-size"] == str(1 << 20)
    extensions = set(answer.headers["tus-extension"].split(","))
    assert extensions == {"creation", "creation-with-upload", "termination", "expiration", "checksum"}
    assert set(answer.headers["tus-checksum-algorithm"].split(",")) == {"sha1", "sha256"}


def test_from_creation_to_a_model(tus: Service) -> None:
    created = tus.http.post(
        "/v1/uploads", headers=VERSION | {"Upload-Length": str(len(DATA))} | promise(DATA, "../net.pt")
    )
    assert created.status_code == 201
    url = created.headers["location"]
    assert url.startswith("/v1/uploads/upl_")
    assert created.headers["upload-offset"] == "0"
    assert abs(parsedate_to_datetime(created.headers["upload-expires"]).timestamp() - time.time() - 24 * 3600) < 60
    looked = tus.http.head(url, headers=VERSION)
    assert (looked.status_code, looked.content, looked.headers["cache-control"]) == (200, b"", "no-store")
    assert (looked.headers["upload-offset"], looked.headers["upload-length"]) == ("0", str(len(DATA)))
    assert looked.headers["upload-metadata"] == promise(DATA, "../net.pt")["Upload-Metadata"]
    offset = 0
    for end in (1, 30_000, len(DATA)):
        sent = patch(tus.http, url, offset, DATA[offset:end])
        assert (sent.status_code, sent.content, sent.headers["upload-offset"]) == (204, b"", str(end))
        assert sent.headers["tus-resumable"] == "1.0.0"
        assert parsedate_to_datetime(sent.headers["upload-expires"])
        assert offset_of(tus.http, url) == offset + len(DATA[offset:end])
        offset = end
    shown = tus.http.get(url).json()
    assert (shown["finished"], shown["offset"], shown["filename"]) == (True, len(DATA), "net.pt")
    assert shown["sha256"] == shown["promised_sha256"] == hashlib.sha256(DATA).hexdigest()
    model = tus.http.post("/v1/models", json={"upload": shown["id"]})
    assert model.status_code == 201
    assert (model.json()["sha256"], model.json()["size_bytes"]) == (shown["sha256"], len(DATA))
    assert model.json()["filename"] == "net.pt"


@pytest.mark.parametrize("size", [1, len(DATA)])
def test_creation_with_upload(tus: Service, size: int) -> None:
    answer = tus.http.post("/v1/uploads", headers=OCTETS | {"Upload-Length": str(len(DATA))}, content=DATA[:size])
    assert (answer.status_code, answer.headers["upload-offset"]) == (201, str(size))
    url = answer.headers["location"]
    if size < len(DATA):
        assert patch(tus.http, url, size, DATA[size:]).status_code == 204
    assert tus.http.get(url).json()["sha256"] == hashlib.sha256(DATA).hexdigest()


def test_creation_with_upload_that_is_refused_leaves_nothing(tus: Service) -> None:
    before = tus.http.get("/v1/uploads?limit=100").json()["items"]
    head = OCTETS | {"Upload-Length": "4"}
    for headers, body, status in (
        (head | checksum("sha1", b"other"), b"data", 460),
        (head | promise(b"other"), b"data", 422),
        (head, b"too long", 413),
    ):
        assert tus.http.post("/v1/uploads", headers=headers, content=body).status_code == status
    assert tus.http.get("/v1/uploads?limit=100").json()["items"] == before


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
def test_checksums(tus: Service, algorithm: str) -> None:
    url = create(tus.http, len(DATA))
    assert patch(tus.http, url, 0, DATA[:100], checksum(algorithm, DATA[:100])).headers["upload-offset"] == "100"
    wrong = patch(tus.http, url, 100, DATA[100:200], checksum(algorithm, DATA[101:201]))
    assert (wrong.status_code, wrong.json()["code"]) == (460, "checksum_mismatch")
    assert offset_of(tus.http, url) == 100
    assert patch(tus.http, url, 100, DATA[100:], checksum(algorithm, DATA[100:])).status_code == 204
    assert tus.http.get(url).json()["sha256"] == hashlib.sha256(DATA).hexdigest()


def test_a_wrong_checksum_at_the_end_completes_nothing(tus: Service) -> None:
    url = create(tus.http, 4)
    assert patch(tus.http, url, 0, b"data", checksum("sha256", b"date")).status_code == 460
    assert tus.http.get(url).json()["finished"] is False
    assert patch(tus.http, url, 0, b"date", checksum("sha256", b"date")).status_code == 204
    assert tus.http.get(url).json()["sha256"] == hashlib.sha256(b"date").hexdigest()


def test_a_broken_promise_ends_the_upload(tus: Service) -> None:
    url = create(tus.http, 4, promise(b"date"))
    broken = patch(tus.http, url, 0, b"data")
    assert (broken.status_code, broken.json()["code"]) == (422, "digest_mismatch")
    assert hashlib.sha256(b"data").hexdigest() in broken.json()["detail"]
    assert tus.http.head(url, headers=VERSION).status_code == 404
    assert tus.http.post("/v1/models", json={"upload": url.rpartition("/")[2]}).status_code == 404


def test_termination(tus: Service) -> None:
    for url in (create(tus.http, 4), f"/v1/uploads/{finished(tus.http, b'done')}"):
        gone = tus.http.delete(url, headers=VERSION)
        assert (gone.status_code, gone.content) == (204, b"")
        for method in ("HEAD", "DELETE"):
            assert tus.http.request(method, url, headers=VERSION).status_code == 404
        assert patch(tus.http, url, 0, b"data").status_code == 404


def test_a_finished_upload_takes_no_more(tus: Service) -> None:
    url = f"/v1/uploads/{finished(tus.http, DATA)}"
    again = patch(tus.http, url, len(DATA), b"")
    assert (again.status_code, again.headers["upload-offset"]) == (204, str(len(DATA)))
    assert patch(tus.http, url, len(DATA), b"x").status_code == 413
    assert patch(tus.http, url, 0, DATA).status_code == 409
    assert tus.http.get(url).json()["sha256"] == hashlib.sha256(DATA).hexdigest()


def test_methods_in_a_header(tus: Service) -> None:
    """For clients that cannot send them."""
    url = create(tus.http, 4)
    with httpx.Client(base_url=tus.url) as http:
        override = OCTETS | {"X-HTTP-Method-Override": "PATCH", "Upload-Offset": "0"}
        assert http.post(url, headers=override, content=b"da").headers["upload-offset"] == "2"
        assert http.post(url, headers=VERSION | {"X-HTTP-Method-Override": "delete"}).status_code == 204
        assert http.post("/v1/jobs", headers={"X-HTTP-Method-Override": "DELETE"}).status_code == 415
    assert tus.http.head(url, headers=VERSION).status_code == 404


def test_lists_and_digests(tus: Service) -> None:
    data = hashlib.sha256(tus.url.encode()).digest()
    sha256 = hashlib.sha256(data).hexdigest()
    begun = create(tus.http, len(data), promise(data)).rpartition("/")[2]
    done = finished(tus.http, data)
    found = tus.http.get("/v1/uploads", params={"sha256": sha256}).json()
    assert [item["id"] for item in found["items"]] == [done, begun]
    first = tus.http.get("/v1/uploads", params={"sha256": sha256, "limit": 1}).json()
    second = tus.http.get("/v1/uploads", params={"sha256": sha256, "cursor": first["next"]}).json()
    assert [item["id"] for item in second["items"]] == [begun]
    assert tus.http.get("/v1/uploads?sha256=ABC").status_code == 400


BASE = VERSION | {"Upload-Length": "4"}
REFUSED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "no version": ({"Upload-Length": "4"}, 412, "precondition_failed", "1.0.0"),
    "another version": (BASE | {"Tus-Resumable": "0.2.2"}, 412, "precondition_failed", "0.2.2"),
    "no length": (VERSION, 400, "invalid_parameter", "Upload-Length"),
    "deferred length": (VERSION | {"Upload-Defer-Length": "1"}, 400, "invalid_parameter", "deferred"),
    "negative length": (BASE | {"Upload-Length": "-1"}, 400, "invalid_parameter", "digits"),
    "signed length": (BASE | {"Upload-Length": "+4"}, 400, "invalid_parameter", "digits"),
    "length that is no number": (BASE | {"Upload-Length": "0x10"}, 400, "invalid_parameter", "digits"),
    "length in other digits": (
        BASE | {"Upload-Length": b"\xb2"},
        400,
        "invalid_parameter",
        "digits",
    ),  # a superscript two
    "empty length": (BASE | {"Upload-Length": ""}, 400, "invalid_parameter", "digits"),
    "empty file": (BASE | {"Upload-Length": "0"}, 400, "invalid_request", "empty"),
    "too long": (BASE | {"Upload-Length": str((1 << 20) + 1)}, 413, "upload_too_large", "1048576"),
    "endless": (BASE | {"Upload-Length": "9" * 60_000}, 413, "upload_too_large", "1048576"),
    "metadata without base64": (BASE | {"Upload-Metadata": "filename ?"}, 400, "invalid_parameter", "base64"),
    "metadata twice": (BASE | {"Upload-Metadata": "a YQ==,a YQ=="}, 400, "invalid_parameter", "twice"),
    "metadata without a key": (BASE | {"Upload-Metadata": "a,,b"}, 400, "invalid_parameter", "key"),
    "huge metadata": (BASE | {"Upload-Metadata": "a " + "YWFh" * 10_000}, 400, "invalid_parameter", "8192"),
    "promise that is no digest": (BASE | metadata(sha256="abc"), 400, "invalid_parameter", "64 hex"),
    "promise that is no text": (BASE | metadata(sha256=b"\xff" * 64), 400, "invalid_parameter", "64 hex"),
    "body of another type": (BASE | {"Content-Type": "text/plain"}, 415, "unsupported_media_type", "offset+octet"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_creations(service: Service, kind: str) -> None:
    headers, status, code, word = REFUSED[kind]
    before = service.http.get("/v1/uploads?limit=100").json()
    content = b"data" if "body" in kind else b""
    answer = service.http.post("/v1/uploads", headers=headers, content=content)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert word in answer.json()["detail"]
    assert answer.headers["tus-resumable"] == "1.0.0"
    assert ("tus-version" in answer.headers) == (status == 412)
    assert service.http.get("/v1/uploads?limit=100").json() == before


PATCH = OCTETS | {"Upload-Offset": "2"}
SHA1 = base64.b64encode(bytes(20)).decode()
UNPATCHED: dict[str, tuple[dict[str, str], int, str]] = {
    "no version": ({**PATCH, "Tus-Resumable": ""}, 412, "precondition_failed"),
    "another type": (PATCH | {"Content-Type": "application/octet-stream"}, 415, "unsupported_media_type"),
    "packed": (PATCH | {"Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
    "no offset": (OCTETS, 400, "invalid_parameter"),
    "negative offset": (PATCH | {"Upload-Offset": "-2"}, 400, "invalid_parameter"),
    "offset before": (PATCH | {"Upload-Offset": "1"}, 409, "offset_mismatch"),
    "offset behind": (PATCH | {"Upload-Offset": "3"}, 409, "offset_mismatch"),
    "offset beyond the end": (PATCH | {"Upload-Offset": "5"}, 409, "offset_mismatch"),
    "offset beyond all numbers": (PATCH | {"Upload-Offset": "9" * 5000}, 409, "offset_mismatch"),
    "too many bytes": (PATCH, 413, "upload_too_large"),
    "unknown checksum": (PATCH | {"Upload-Checksum": f"md5 {SHA1}"}, 400, "invalid_parameter"),
    "checksum in upper case": (PATCH | {"Upload-Checksum": f"SHA1 {SHA1}"}, 400, "invalid_parameter"),
    "checksum without a value": (PATCH | {"Upload-Checksum": "sha1"}, 400, "invalid_parameter"),
    "checksum of another length": (PATCH | {"Upload-Checksum": f"sha256 {SHA1}"}, 400, "invalid_parameter"),
    "checksum that is no base64": (PATCH | {"Upload-Checksum": "sha1 ????"}, 400, "invalid_parameter"),
    "empty checksum": (PATCH | {"Upload-Checksum": ""}, 400, "invalid_parameter"),
}


@pytest.mark.parametrize("kind", UNPATCHED)
def test_refused_bytes(service: Service, kind: str) -> None:
    headers, status, code = UNPATCHED[kind]
    url = create(service.http, 4)
    patch(service.http, url, 0, b"da")
    answer = service.http.patch(url, headers=headers, content=b"ta too many"[: 11 if "many" in kind else 2])
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert offset_of(service.http, url) == 2
    assert patch(service.http, url, 2, b"ta").status_code == 204


def test_more_bytes_than_announced_are_refused_on_their_way(tus: Service) -> None:
    url = create(tus.http, 1000)

    def endless() -> Any:
        for _ in range(1000):
            yield b"x" * 100

    answer = patch(tus.http, url, 0, endless())
    assert (answer.status_code, answer.json()["code"]) == (413, "upload_too_large")
    assert tus.http.get(url).json()["finished"] is False


@pytest.mark.parametrize(
    "id", ["upl_" + "0" * 26, "..", "../models", "upl_..%2f..%2fetc", "%2e%2e%2fpasswd", "x" * 4000, "upl_%00", "ü"]
)
def test_ids_that_name_nothing(service: Service, id: str) -> None:
    with httpx.Client(base_url=service.url) as http:
        for method in ("HEAD", "PATCH", "DELETE"):
            answer = http.request(method, f"/v1/uploads/{id}", headers=OCTETS | {"Upload-Offset": "0"})
            assert answer.status_code in (404, 405), (method, answer.status_code)


def test_methods_that_there_are_not(service: Service) -> None:
    url = create(service.http, 4)
    for method, path in (("PUT", url), ("POST", url), ("DELETE", "/v1/uploads"), ("PATCH", "/v1/uploads")):
        answer = service.http.request(method, path, headers=VERSION)
        assert (answer.status_code, answer.headers["tus-resumable"]) == (405, "1.0.0")
    assert service.http.get(f"/v1/blobs/sha256:{'0' * 64}").status_code == 405


def test_uploads_belong_to_their_account(guarded: Service) -> None:
    mine, theirs = (guarded.client(guarded.store.create_key(name, "")[1]) for name in ("mine", "theirs"))
    url = create(mine, 4, promise(b"data"))
    for answer in (
        theirs.head(url, headers=VERSION),
        patch(theirs, url, 0, b"data"),
        theirs.delete(url, headers=VERSION),
        theirs.get(url),
    ):
        assert answer.status_code == 404
    assert theirs.get("/v1/uploads").json()["items"] == []
    assert guarded.http.head(url, headers=VERSION).status_code == 401
    assert patch(guarded.http, url, 0, b"data").status_code == 401
    assert guarded.http.post("/v1/uploads", headers=BASE).status_code == 401
    assert guarded.http.options("/v1/uploads").status_code == 401
    assert offset_of(mine, url) == 0
    assert patch(mine, url, 0, b"data").status_code == 204
    refused = theirs.post("/v1/models", json={"upload": url.rpartition("/")[2]})
    assert (refused.status_code, refused.json()["pointer"]) == (404, "/upload")


def test_unfinished_uploads_are_limited(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(settings_in(tmp_path_factory.mktemp("few"), max_open_uploads=2)) as few:
        urls = [create(few.http, 4) for _ in range(2)]
        refused = few.http.post("/v1/uploads", headers=BASE)
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_uploads")
        patch(few.http, urls[0], 0, b"data")
        create(few.http, 4)
        few.http.delete(urls[1], headers=VERSION)
        create(few.http, 4)


def test_what_has_expired_is_not_there(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(settings_in(tmp_path_factory.mktemp("short"), upload_expiry_seconds=0.5)) as short:
        url = create(short.http, 4)
        time.sleep(0.6)
        assert short.http.head(url, headers=VERSION).status_code == 404
        assert patch(short.http, url, 0, b"data").status_code == 404
        assert short.http.get("/v1/uploads").json()["items"] == []
