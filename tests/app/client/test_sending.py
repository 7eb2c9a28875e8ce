"""The client's way with large files: resumed by itself, counted on the wire."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from app.client import Client, ClientError, sending
from app.launch import free_port
from tests.app.conftest import settings_in
from tests.app.service import Service, running
from tests.app.test_server import api_process
from tests.app.uploads.resumable import VERSION
from tests.app.wire import Wire, wire

MIB = 1 << 20
SIZE = 12 * MIB
SPEC = {
    "task": "image-classification",
    "input": {"shape": [1, 28, 28], "dtype": "float32"},
    "architecture": {"layers": [{"type": "Flatten"}, {"type": "Linear", "in_features": 784, "out_features": 10}]},
}


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.client.client.RESUMABLE_BYTES", MIB)
    monkeypatch.setattr(sending, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(sending, "LONGEST_PAUSE_SECONDS", 0.2)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(settings_in(tmp_path_factory.mktemp("roomy"), max_upload_bytes=1 << 30, max_open_uploads=3)) as found:
        yield found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Bytes that the service does not know."""
    path = tmp_path / "large model.safetensors"
    path.write_bytes(os.urandom(SIZE))
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check(between: Wire, path: Path, model: dict[str, object]) -> None:
    """The bytes are right, and none was sent again after it had been acknowledged."""
    assert (model["sha256"], model["size_bytes"]) == (digest(path), path.stat().st_size)
    assert [sent for sent in between.sent if sent.sent_twice] == []


def test_a_large_file_is_sent_once(roomy: Service, file: Path) -> None:
    seen: list[tuple[int, int]] = []
    with wire(roomy.url) as between, Client(between.url) as client:
        model = client.upload_model(file, SPEC, lambda sent, size: seen.append((sent, size)))
        check(between, file, model)
        assert between.total == SIZE
        assert [sent.offset for sent in between.sent] == [0]
    assert (model["filename"], model["spec"]) == (file.name, SPEC)
    assert (seen[0], seen[-1]) == ((0, SIZE), (SIZE, SIZE))
    assert [sent for sent, _ in seen] == sorted(sent for sent, _ in seen)


def test_cuts_are_mended(roomy: Service, file: Path) -> None:
    cuts = sorted(random.Random(7).sample(range(1, SIZE), 8))
    with wire(roomy.url, cuts) as between, Client(between.url) as client:
        check(between, file, client.upload_model(file, SPEC))
        assert between.broken == 8
        assert len(between.sent) >= 9


def test_requests_are_bounded(roomy: Service, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "REQUEST_BYTES", 5 * MIB)
    with wire(roomy.url) as between, Client(between.url) as client:
        check(between, file, client.upload_dataset(file))
        assert [sent.count for sent in between.sent] == [5 * MIB, 5 * MIB, 2 * MIB]


def test_what_the_service_holds_is_not_sent(roomy: Service, file: Path) -> None:
    with wire(roomy.url) as between, Client(between.url) as client:
        first = client.upload_model(file, SPEC)
        second = client.upload_dataset(file)
        check(between, file, second)
        assert first["id"] != second["id"]
        assert between.total == SIZE


def test_a_small_file_goes_in_one_request(roomy: Service, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x" * MIB)
    with wire(roomy.url) as between, Client(between.url) as client:
        client.upload_model(small)
        assert between.requests == ["POST /v1/models?filename=small"]


class Killed(BaseException):
    """The client's process ends."""


def at(share: float, action: Callable[[], None]) -> Callable[[int, int], None]:
    """A callback that acts once so much has been sent."""
    done: list[int] = []

    def on_progress(sent: int, size: int) -> None:
        if sent >= share * size and not done:
            done.append(sent)
            action()

    return on_progress


def kill() -> None:
    raise Killed


def test_a_client_that_was_killed_goes_on_when_it_is_started_again(roomy: Service, file: Path) -> None:
    with wire(roomy.url) as between:
        with Client(between.url) as client, pytest.raises(Killed):
            client.upload_model(file, SPEC, at(0.5, kill))
        with Client(between.url) as client:
            check(between, file, client.upload_model(file, SPEC))
        assert between.sent[1].offset > 0
        assert between.total < 1.5 * SIZE
    assert len([request for request in between.requests if request == "POST /v1/uploads"]) == 1


def test_a_service_that_is_killed_is_waited_for(tmp_path: Path, file: Path) -> None:
    """`kill -9` in the middle of a request; another process comes up after a while, at another port."""
    with ExitStack() as stack:
        first, process = stack.enter_context(api_process(tmp_path))
        between = stack.enter_context(wire(first))

        def die() -> None:
            process.kill()
            process.wait()
            between.target = free_port()  # nobody answers
            threading.Thread(target=restart, daemon=True).start()

        def restart() -> None:
            second, _ = stack.enter_context(api_process(tmp_path))
            between.target = int(second.rpartition(":")[2])

        with Client(between.url) as client:
            check(between, file, client.upload_model(file, SPEC, at(0.5, die)))
        assert len(between.sent) > 1


def test_two_clients_send_one_file_together(roomy: Service, file: Path) -> None:
    models: list[dict[str, object]] = []

    def upload(url: str) -> None:
        with Client(url) as client:
            models.append(client.upload_model(file, SPEC))

    with wire(roomy.url) as first, wire(roomy.url) as second:
        threads = [threading.Thread(target=upload, args=(between.url,), daemon=True) for between in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [model["sha256"] for model in models] == [digest(file)] * 2


def test_an_upload_that_was_terminated_begins_anew(roomy: Service, file: Path) -> None:
    def terminate() -> None:
        for item in roomy.http.get("/v1/uploads", params={"sha256": digest(file)}).json()["items"]:
            while roomy.http.delete(f"/v1/uploads/{item['id']}", headers=VERSION).status_code == 423:
                time.sleep(0.05)

    cuts = [SIZE // 2]
    with wire(roomy.url, cuts) as between, Client(between.url) as client:
        gone: list[None] = []
        client._http.event_hooks = {
            "request": [lambda request: between.broken and not gone and gone.append(terminate())]
        }
        assert client.upload_model(file, SPEC)["sha256"] == digest(file)
        assert gone
        assert len([request for request in between.requests if request == "POST /v1/uploads"]) == 2


def test_a_file_that_changes_is_not_mixed(roomy: Service, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "REQUEST_BYTES", 5 * MIB)
    with Client(roomy.url) as client:
        with pytest.raises(ClientError, match="changed"):
            client.upload_model(file, SPEC, at(0.3, lambda: file.write_bytes(os.urandom(SIZE))))
        client.upload_model(file, SPEC)


def test_a_change_that_does_not_show_is_found_at_the_end(
    roomy: Service, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending.Sender, "_digest", lambda _: "0" * 64)
    with Client(roomy.url) as client, pytest.raises(ClientError) as refused:
        client.upload_model(file, SPEC)
    assert (refused.value.status, refused.value.code) == (422, "digest_mismatch")
    assert roomy.http.get("/v1/uploads", params={"sha256": "0" * 64}).json()["items"] == []


def test_a_refusal_is_told_at_once(roomy: Service, file: Path) -> None:
    with Client(roomy.url) as client, pytest.raises(ClientError, match="/spec/colour"):
        client.upload_model(file, SPEC | {"colour": "red"})
    with wire(roomy.url) as between, Client(between.url) as client:  # … but the bytes have come
        client.upload_model(file, SPEC)
        assert between.total == 0


def test_too_many_uploads_are_told(roomy: Service, file: Path) -> None:
    made = []
    while (answer := roomy.http.post("/v1/uploads", headers=VERSION | {"Upload-Length": "9"})).status_code == 201:
        made.append(answer.headers["location"])
    with Client(roomy.url) as client, pytest.raises(ClientError) as refused:
        client.upload_model(file, SPEC)
    assert refused.value.code == "too_many_uploads"
    for url in made:
        roomy.http.delete(url, headers=VERSION)


def test_patience_ends(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "PATIENCE_SECONDS", 0.3)
    with Client(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(ClientError) as silence:
        client.upload_model(file, SPEC)
    assert silence.value.code == "unreachable"
