"""What a policy opens, and what an operator reads of it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

import worker
from app.settings import Settings
from worker import service
from worker.sandbox.landlock import Access
from worker.sandbox.offer import Offer, offer
from worker.sandbox.policy import ACCELERATOR_SYSTEM, Policy, exposed, interpreter, policy_for, source_roots

POLICY = Policy(Path("/data/scratch/job_1-1"), Path("/data/scratch/job_1-1/work"), (Path("/opt/python"),))


def rights(policy: Policy, name: str) -> Access:
    """What is granted at a path, by itself and its parents."""
    found = Access(0)
    for path, access in policy.grants():
        if Path(name).is_relative_to(path):
            found |= access
    return found


def test_one_folder_can_be_written_to() -> None:
    writable = {str(path) for path, access in POLICY.grants() if access & (Access.MAKE_REG | Access.REMOVE_FILE)}
    assert writable == {"/data/scratch/job_1-1/work"}
    assert rights(POLICY, "/data/scratch/job_1-1/model") == Access.READ_FILE | Access.READ_DIR
    assert not rights(POLICY, "/data/scratch/job_1-1/work/program") & Access.EXECUTE
    for name in ("/", "/data", "/data/tersor.db", "/data/scratch/job_2-1/model", "/etc/passwd", "/root", "/home/me"):
        assert rights(POLICY, name) == 0, name


def test_shared_memory_and_accelerators_are_opened_on_demand() -> None:
    assert rights(POLICY, "/dev/shm/x") == rights(POLICY, ACCELERATOR_SYSTEM[0]) == 0
    assert rights(replace(POLICY, shared_memory=True), "/dev/shm/x") & Access.MAKE_REG
    assert not rights(replace(POLICY, shared_memory=True), "/dev/shm") & Access.READ_DIR
    assert rights(replace(POLICY, accelerator=True), ACCELERATOR_SYSTEM[0]) == Access.READ_FILE | Access.READ_DIR


def test_the_interpreter_is_readable_and_its_neighbours_are_not() -> None:
    found = interpreter()
    for needed in (os.__file__, json.__file__, worker.__file__, pytest.__file__):
        assert any(Path(needed).is_relative_to(path) for path in found), needed
    assert Path(sysconfig.get_path("stdlib")) in found
    assert not {Path("/"), Path.home(), Path(sys.prefix), Path(worker.__file__).parents[1]} & set(found)
    assert Path(worker.__file__).parents[1] in source_roots()


def test_data_among_libraries_is_noticed(tmp_path: Path) -> None:
    def found(data_dir: Path, **settings: str) -> list[Path]:
        return exposed(Settings(data_dir=data_dir, **settings))  # type: ignore[arg-type]

    (tmp_path / "link").symlink_to(interpreter()[0])
    assert found(tmp_path) == []
    assert found(tmp_path, database_url="postgresql://host/db", blobs_url="s3://bucket") == []
    assert found(Path("/usr/share/tersor"))[0] == Path("/usr/share/tersor")
    assert found(tmp_path / "link" / "data")
    assert found(tmp_path, blobs_url="file:///usr/share/blobs") == [Path("/usr/share/blobs")]
    assert found(tmp_path, sandbox_readable=str(tmp_path.parent))[0] == tmp_path


def test_the_settings_decide(tmp_path: Path) -> None:
    def made(**settings: object) -> Policy | None:
        return policy_for(Settings(data_dir=tmp_path, **settings), tmp_path, tmp_path / "work", shared_memory=False)  # type: ignore[arg-type]

    assert made(sandbox="off") is None
    auto, required = made(), made(sandbox="require", sandbox_readable="/opt/cuda:/srv/models")
    assert auto is not None
    assert required is not None
    assert (auto.required, required.required) == (False, True)
    assert set(required.readable) - set(auto.readable) == {Path("/opt/cuda"), Path("/srv/models")}


def test_an_offer_says_what_is_missing() -> None:
    assert Offer(7, True).sentence() == "on (Landlock ABI 7, seccomp)"
    assert Offer(1, True).complete
    nothing = Offer(0, False)
    assert not nothing.complete
    assert "no Landlock" in nothing.sentence()
    assert "no system call filters" in nothing.sentence()
    assert "seccomp" not in Offer(0, True).sentence()


@pytest.mark.landlock
@pytest.mark.seccomp
def test_this_kernel_offers_everything() -> None:
    assert offer().complete
    assert offer(newest_landlock=0) == Offer(0, True)


def test_a_worker_says_which_walls_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "offer", lambda: Offer(4, True))
    assert service.walls(Settings(data_dir=tmp_path)) == "on (Landlock ABI 4, seccomp)"
    assert service.walls(Settings(data_dir=tmp_path, sandbox="off")) == "off (TERSOR_SANDBOX=off)"
    among = Settings(data_dir=interpreter()[0] / "data")
    assert "lies among libraries" in service.walls(among)


def test_a_worker_that_needs_more_walls_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "offer", lambda: Offer(0, True))
    assert "no Landlock" in service.walls(Settings(data_dir=tmp_path))
    with pytest.raises(SystemExit, match="TERSOR_SANDBOX=require, but"):
        service.walls(Settings(data_dir=tmp_path, sandbox="require"))
    monkeypatch.setattr(service, "offer", lambda: Offer(7, True))
    with pytest.raises(SystemExit, match="lies among libraries"):
        service.walls(Settings(data_dir=interpreter()[0] / "data", sandbox="require"))


def test_what_this_installation_says_of_itself_can_be_read() -> None:
    """Wherever it was found, in place or among the packages: the report gives the version."""
    folder = Path(str(importlib.metadata.distribution("tersor").locate_file("")))
    described = [*folder.glob("tersor.egg-info"), *folder.glob("tersor-*.dist-info")]
    assert described
    assert all(any(path.is_relative_to(granted) for granted in interpreter()) for path in described)
