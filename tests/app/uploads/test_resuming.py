"""Uploads that are cut, stall, collide, or lose their service: what was acknowledged stays, nobody writes over it."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from obstore.store import LocalStore

from app.auth import LOCAL_ACCOUNT
from app.contract.blobs import Blobs
from app.contract.store import JobStore
from tests.app.conftest import settings_in
from tests.app.service import HANG_SECONDS, Service, running
from tests.app.test_server import api_process
from tests.app.uploads.resumable import VERSION, Cut, checksum, create, finished, offset_of, patch, promise

DATA = os.urandom(600_000)
MIB = 1 << 20


@pytest.fixture(scope="module", params=["folder", "objects"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Service]]:
    """Two services over one database and one blob store, as behind a load balancer."""
    folder = tmp_path_factory.mktemp("pair")
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patching:
        if request.param == "objects":
            (folder / "objects").mkdir()
            store = LocalStore(folder / "objects")
            patching.setattr(Blobs, "open", lambda _: Blobs(store))
        first, second = (stack.enter_context(running(settings_in(folder))) for _ in range(2))
        patching.undo()
        yield first, second


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


def attempts(store: JobStore, url: str) -> int:
    """How many requests have held the upload so far."""
    return store.get_resumable(LOCAL_ACCOUNT, url.rpartition("/")[2]).attempt


@contextmanager
def holding(service: Service, url: str, offset: int, length: int) -> Iterator[Cut]:
    """A request that holds the upload by now."""
    before = attempts(service.store, url)
    with Cut(service.url, url, offset, length) as cut:
        until(lambda: attempts(service.store, url) > before)
        yield cut


def sha256(http: httpx.Client, url: str) -> str:
    found = http.get(url).json()
    assert found["finished"]
    return str(found["sha256"])


DIGEST = hashlib.sha256(DATA).hexdigest()


def test_what_came_before_a_cut_is_kept(pair: tuple[Service, Service]) -> None:
    here, there = pair
    url = create(here.http, len(DATA))
    offset = 0
    for end in (100_000, 350_001):
        with Cut(here.url, url, offset, len(DATA) - offset) as cut:
            cut.send(DATA[offset:end])
        until(lambda http=there.http, end=end: offset_of(http, url) == end)  # type: ignore[misc]
        offset = end
        here, there = there, here  # the client comes back to another process, which did not see what came before
    until(lambda: patch(here.http, url, offset, DATA[offset:]).status_code == 204)
    assert sha256(there.http, url) == DIGEST


def test_one_request_at_a_time(pair: tuple[Service, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.uploads.resuming.YIELD_SECONDS", 60)
    here, there = pair
    url = create(here.http, len(DATA))
    with holding(here, url, 0, len(DATA)) as cut:
        for service in pair:
            refused = patch(service.http, url, 0, DATA)
            assert (refused.status_code, refused.json()["code"]) == (423, "upload_locked")
            assert refused.headers["retry-after"] == "1"
            assert service.http.delete(url, headers=VERSION).status_code == 423
            assert offset_of(service.http, url) == 0
        cut.send(DATA)
        assert b" 204 " in cut.answer()
    assert sha256(there.http, url) == DIGEST


def test_a_long_body_is_not_read_to_its_end_in_vain(service: Service) -> None:
    url = create(service.http, MIB)
    with holding(service, url, 0, MIB) as cut:
        cut.send(b"x")
        with Cut(service.url, url, 0, 8 * MIB) as other:
            assert b" 413 " in other.answer()  # longer than the upload
        with Cut(service.url, url, 7, 8 * MIB) as other:
            head = other.answer()
            assert b" 409 " in head
            assert b"connection: close" in head.lower()


def test_a_silent_connection_is_overtaken(pair: tuple[Service, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client is gone, but nobody has told the service."""
    monkeypatch.setattr("app.uploads.resuming.YIELD_SECONDS", 0.3)
    here, there = pair
    url = create(here.http, len(DATA))
    with Cut(here.url, url, 0, len(DATA)) as silent:
        silent.send(DATA[:1000])
        until(lambda: offset_of(there.http, url) == 1000)
        until(lambda: patch(there.http, url, 1000, DATA[1000:2000]).status_code == 204)
        silent.send(b"LATE")
        assert b" 409 " in silent.answer()
    assert offset_of(here.http, url) == 2000
    assert patch(here.http, url, 2000, DATA[2000:]).status_code == 204
    assert sha256(there.http, url) == DIGEST


def test_a_slow_connection_goes_on(pair: tuple[Service, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.uploads.resuming.YIELD_SECONDS", 0.1)
    here, there = pair
    url = create(here.http, len(DATA))
    with Cut(here.url, url, 0, len(DATA)) as slow:
        for start in range(0, len(DATA), 200_000):
            slow.send(DATA[start : start + 200_000])
            until(lambda start=start: offset_of(there.http, url) == start + 200_000)  # type: ignore[misc]
            time.sleep(0.2)
        assert b" 204 " in slow.answer()
    assert sha256(there.http, url) == DIGEST


def test_a_connection_that_stays_silent_is_given_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.uploads.resuming.YIELD_SECONDS", 0.1)
    monkeypatch.setattr("app.uploads.resuming.IDLE_SECONDS", 0.3)
    url = create(service.http, len(DATA))
    with Cut(service.url, url, 0, len(DATA)) as silent:
        silent.send(DATA[:1000])
        answer = silent.answer()
    assert b" 400 " in answer
    assert offset_of(service.http, url) == 1000


def test_bytes_with_a_checksum_that_do_not_all_come_are_not_kept(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.uploads.resuming.CHECKED_IDLE_SECONDS", 0.2)
    url = create(service.http, len(DATA))
    with Cut(service.url, url, 0, 5000, checksum("sha256", DATA[:5000])) as silent:
        silent.send(DATA[:1000])
        assert b" 400 " in silent.answer()
    with Cut(service.url, url, 0, 5000, checksum("sha256", DATA[:5000])) as cut:
        cut.send(DATA[:1000])
    until(lambda: patch(service.http, url, 0, DATA).status_code == 204)
    assert sha256(service.http, url) == DIGEST


def test_bytes_that_were_lost_end_the_upload(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as service:
        url = create(service.http, len(DATA))
        patch(service.http, url, 0, DATA[:1000])
        (partial,) = service.files()
        partial.unlink()
        answer = patch(service.http, url, 1000, DATA[1000:])
        assert (answer.status_code, answer.json()["code"]) == (410, "blob_missing")
        assert service.http.head(url, headers=VERSION).status_code == 404
        assert service.files() == set()


@contextmanager
def stopped_before(stage: str) -> Iterator[None]:
    """The service dies, as far as the upload is concerned, before this step of its completion."""

    def die(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(stage, die)
        yield


@pytest.mark.parametrize(
    "stage",
    [
        "app.contract.blobs.digest.RunningDigest.catch_up",
        "app.contract.store.JobStore.pin_resumable",
        "app.contract.blobs.folder_partial.FolderPartial.promote",
        "app.contract.store.JobStore.finish_resumable",
    ],
)
@pytest.mark.parametrize("way", ["model", "patch"])
def test_a_completion_that_broke_off_is_taken_up(service: Service, stage: str, way: str) -> None:
    data = os.urandom(1000)
    digest = hashlib.sha256(data).hexdigest()
    url = create(service.http, len(data), promise(data))
    with stopped_before(stage), httpx.Client(base_url=service.url) as http:
        assert patch(http, url, 0, data).status_code == 500
    found = service.http.get(url).json()
    assert (found["offset"], found["finished"]) == (len(data), False)
    if way == "patch":
        assert patch(service.http, url, len(data), b"").status_code == 204
    model = service.http.post("/v1/models", json={"upload": found["id"]})
    assert (model.status_code, model.json()["sha256"]) == (201, digest), model.text
    assert service.blobs.size(service.blobs.blob_key(digest)) == len(data)
    assert not any(found["id"] in path.name for path in service.files())


def test_a_killed_service_goes_on_from_what_it_acknowledged(tmp_path: Path) -> None:
    """`kill -9` in the middle of a request, twice."""
    data = os.urandom(24 * MIB)
    digest = hashlib.sha256(data).hexdigest()
    acknowledged = sent = 0
    url = ""
    for share in (0.3, 0.6, 1.0):
        with api_process(tmp_path) as (base, process), httpx.Client(base_url=base, timeout=HANG_SECONDS) as http:
            url = url or create(http, len(data), promise(data))
            offset = offset_of(http, url)
            assert acknowledged <= offset <= sent
            if share == 1.0:
                assert patch(http, url, offset, data[offset:]).status_code == 204
                assert sha256(http, url) == digest
                assert http.post("/v1/models", json={"upload": url.rpartition("/")[2]}).json()["sha256"] == digest
                continue
            sent = int(share * len(data))
            with Cut(base, url, offset, len(data) - offset) as cut:
                cut.send(data[offset:sent])
                while (acknowledged := offset_of(http, url)) <= offset:
                    time.sleep(0.05)
                process.send_signal(signal.SIGKILL)
                process.wait()
    assert [path.name for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == [digest[2:]]


def test_a_service_that_is_stopped_keeps_what_came_and_ends_soon(tmp_path: Path) -> None:
    data = os.urandom(MIB)
    with api_process(tmp_path) as (base, process), httpx.Client(base_url=base) as http:
        url = create(http, len(data))
        with Cut(base, url, 0, len(data)) as cut:
            cut.send(data[:1000])
            until(lambda: offset_of(http, url) == 1000)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            cut.send(data[1000:2000])
            assert b" 503 " in cut.answer()
        assert process.wait(HANG_SECONDS) in (0, -signal.SIGTERM)
    with api_process(tmp_path) as (base, _), httpx.Client(base_url=base) as http:
        assert offset_of(http, url) == 2000
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_two_processes_exclude_each_other(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as service:
        blobs = service.settings.blobs
        with api_process(tmp_path, TERSOR_BLOBS_URL=blobs) as (base, process), httpx.Client(base_url=base) as http:
            url = create(http, len(DATA))
            with Cut(base, url, 0, len(DATA)) as cut:
                cut.send(DATA[:1000])
                until(lambda: attempts(service.store, url) == 1)
                assert patch(service.http, url, 0, DATA).status_code == 423
                process.send_signal(signal.SIGKILL)
                process.wait()
            # The kernel has let go of it at once: nobody waits for a lease to end.
            offset = offset_of(service.http, url)
            assert patch(service.http, url, offset, DATA[offset:]).status_code == 204


def test_an_object_store_is_held_by_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was killed keeps others out until its lease ends; one that lives renews it."""
    monkeypatch.setattr("app.uploads.resuming.LEASE_SECONDS", 3)
    monkeypatch.setattr("app.uploads.resuming.YIELD_SECONDS", 60)
    settings = settings_in(tmp_path, blobs_url="memory:///")
    with running(settings) as service:
        url = create(service.http, len(DATA))
        id = url.rpartition("/")[2]
        store = JobStore.open(settings.database)
        store.take_resumable(id, 5, False)
        store.close()
        assert patch(service.http, url, 0, DATA).status_code == 423
        until(lambda: patch(service.http, url, 0, DATA[:1000]).status_code == 204)
        with holding(service, url, 1000, len(DATA) - 1000) as cut:
            cut.send(DATA[1000:2000])
            time.sleep(4)  # longer than the lease
            assert patch(service.http, url, offset_of(service.http, url), b"x").status_code == 423
            cut.send(DATA[2000:])
            assert b" 204 " in cut.answer()
        assert sha256(service.http, url) == DIGEST


def test_finished_bytes_may_be_used_more_than_once(service: Service) -> None:
    id = finished(service.http, DATA)
    first = service.http.post("/v1/models", json={"upload": id, "filename": "a.pt"}).json()
    second = service.http.post("/v1/datasets", json={"upload": id, "spec": {}}).json()
    assert first["sha256"] == second["sha256"] == DIGEST
    assert (first["filename"], second["filename"]) == ("a.pt", "upload")
