"""Artifacts: ranges, tags, digests."""

from __future__ import annotations

import base64
import hashlib

import pytest

from tests.app.service import Service

CONTENT = bytes(range(256)) * 20_000  # 5 MB: several chunks
SIZE = len(CONTENT)
SHA256 = hashlib.sha256(CONTENT)


@pytest.fixture(scope="module")
def path(service: Service) -> str:
    return f"/v1/jobs/{service.finished(content=CONTENT)}/artifacts/model.onnx"


def test_the_list(service: Service, path: str) -> None:
    (item,) = service.http.get(path.rpartition("/")[0]).json()
    assert item == {
        "name": "model.onnx",
        "format": "onnx",
        "size_bytes": SIZE,
        "sha256": SHA256.hexdigest(),
        "media_type": "application/octet-stream",
        "href": path,
    }


def test_the_whole_file(service: Service, path: str) -> None:
    answer = service.http.get(path)
    assert (answer.status_code, answer.content == CONTENT) == (200, True)
    assert answer.headers["etag"] == f'"{SHA256.hexdigest()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(SHA256.digest()).decode()}:"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-length"] == str(SIZE)
    assert "model.onnx" in answer.headers["content-disposition"]


def test_head(service: Service, path: str) -> None:
    whole, part = service.http.head(path), service.http.head(path, headers={"Range": "bytes=1-2"})
    assert (whole.status_code, whole.content, whole.headers["content-length"]) == (200, b"", str(SIZE))
    assert (part.status_code, part.headers["content-length"]) == (206, "2")


@pytest.mark.parametrize(
    ("range", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-99", 10, 100),
        ("bytes=100-", 100, SIZE),
        (f"bytes=100-{SIZE * 9}", 100, SIZE),
        ("bytes=-7", SIZE - 7, SIZE),
        (f"bytes=-{SIZE * 9}", 0, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
    ],
)
def test_a_range(service: Service, path: str, range: str, start: int, end: int) -> None:
    answer = service.http.get(path, headers={"Range": range})
    assert (answer.status_code, answer.headers["content-range"]) == (206, f"bytes {start}-{end - 1}/{SIZE}")
    assert answer.content == CONTENT[start:end]


@pytest.mark.parametrize("range", ["bytes=0-1,5-6", "bytes=9-3", "lines=1-2", "bytes=-", "bytes=a-b", "bytes"])
def test_a_range_that_counts_for_nothing(service: Service, path: str, range: str) -> None:
    answer = service.http.get(path, headers={"Range": range})
    assert (answer.status_code, len(answer.content)) == (200, SIZE)


@pytest.mark.parametrize("range", [f"bytes={SIZE}-", "bytes=-0", f"bytes={SIZE * 5}-{SIZE * 6}"])
def test_no_byte_of_the_range(service: Service, path: str, range: str) -> None:
    answer = service.http.get(path, headers={"Range": range})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{SIZE}")
    assert answer.json()["code"] == "range_not_satisfiable"


def test_conditions(service: Service, path: str) -> None:
    tag = f'"{SHA256.hexdigest()}"'
    assert service.http.get(path, headers={"If-None-Match": tag}).status_code == 304
    assert service.http.get(path, headers={"If-None-Match": '"x"'}).status_code == 200
    part = {"Range": "bytes=0-4"}
    assert service.http.get(path, headers=part | {"If-Range": tag}).status_code == 206
    assert service.http.get(path, headers=part | {"If-Range": '"older"'}).status_code == 200
    assert service.http.get(path, headers=part | {"If-Match": tag}).status_code == 206
    refused = service.http.get(path, headers={"If-Match": '"older"'})
    assert (refused.status_code, refused.json()["code"]) == (412, "precondition_failed")


def test_what_is_not_there(service: Service, path: str) -> None:
    folder = path.rpartition("/")[0]
    for name in ("other.onnx", "%00", "..%2f..%2ftersor.db"):
        assert service.http.get(f"{folder}/{name}").status_code == 404
    early = service.http.get(f"/v1/jobs/{service.job()['id']}/artifacts")
    assert (early.status_code, early.json()["code"]) == (409, "conflict")


def test_bytes_that_are_gone(service: Service) -> None:
    job = service.finished()
    service.blobs.delete_prefix(f"jobs/{job}/")
    answer = service.http.get(f"/v1/jobs/{job}/artifacts/model.onnx")
    assert (answer.status_code, answer.json()["code"]) == (410, "blob_missing")
