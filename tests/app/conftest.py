"""A real server in a thread of the test process; tests drive the store beside it as a worker would."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.settings import Settings
from tests.app.service import Service, running


def settings_in(folder: Path, **changes: object) -> Settings:
    """A service in a folder, whose broker does not answer: the sweep is what rings then."""
    given: dict[str, object] = {
        "data_dir": folder,
        "broker_url": "redis://127.0.0.1:1/0",
        "port": 0,
        "max_upload_bytes": 1 << 20,
        "max_json_bytes": 64 << 10,
    }
    return Settings(**(given | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session", autouse=True)
def _no_environment() -> None:
    for name in [name for name in os.environ if name.startswith("TERSOR_")]:
        del os.environ[name]


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service that most tests share; no key is needed."""
    with running(settings_in(tmp_path_factory.mktemp("service"))) as found:
        yield found


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that wants keys."""
    with running(settings_in(tmp_path_factory.mktemp("guarded"), api_keys_required=True)) as found:
        yield found
