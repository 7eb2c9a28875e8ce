"""The hostile corpus through the real inspection in a real child: refused with a sentence, and nothing else happens."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.hostile.corpus import FAMILIES
from tests.hostile.member import READY, Member
from tests.hostile.service import Service, Verdict, own_forkserver

CORPUS = {f"{family}: {member.name}": member for family, make in FAMILIES.items() for member in make()}
CPU_SECONDS = 10.0  # of the processor: how long it takes on a busy machine says nothing of the file
MEMORY_BYTES = 1 << 30  # beyond the bare child


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with own_forkserver():
        yield Service(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def gullible(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with own_forkserver():
        yield Service(tmp_path_factory.mktemp("gullible"), entry="gullible")


def test_the_corpus_has_its_families() -> None:
    assert len(FAMILIES) >= 14
    assert len(CORPUS) == sum(len(list(make())) for make in FAMILIES.values())  # no two members share a name


@pytest.mark.parametrize("name", CORPUS)
def test_a_hostile_file_is_refused_and_does_nothing(service: Service, name: str) -> None:
    member = CORPUS[name]
    verdict = service.inspect(member)
    check_verdict(member, verdict)
    check_traces(service, verdict)


def check_verdict(member: Member, verdict: Verdict) -> None:
    if member.says is READY:
        assert verdict.record.status == "ready", verdict.said
        return
    assert verdict.record.status == "rejected"
    problem = verdict.record.problem
    assert problem is not None
    assert (problem.code, problem.retryable) == (f"{member.kind}_rejected", False)
    assert re.search(member.says, problem.detail), problem.detail
    assert 30 < len(problem.detail) < 2000
    assert "could not be inspected" not in problem.detail  # it was ended at a limit, or it met a fault of ours
    assert "Traceback" not in problem.detail


def check_traces(service: Service, verdict: Verdict) -> None:
    assert not verdict.canary
    assert not verdict.appeared
    assert not any(service.bench.settings.scratch.iterdir())
    assert str(service.folder) not in verdict.said
    kept = service.bench.blobs.exists(service.bench.blobs.blob_key(verdict.record.sha256))
    assert kept == (verdict.record.status == "ready")
    assert verdict.figures is not None
    assert verdict.figures.canaries == 0
    assert verdict.figures.seconds < CPU_SECONDS
    assert verdict.figures.bytes < MEMORY_BYTES


GULLIBLE = ("pickles: bare", "pickles: torch.save", "attacks of programs: weight", "attacks of programs: expression")


@pytest.mark.parametrize("place", ["in scratch", pytest.param("outside", marks=pytest.mark.landlock)])
@pytest.mark.parametrize("name", GULLIBLE)
def test_a_reader_that_trusts_the_file_is_caught(gullible: Service, name: str, place: str) -> None:
    """The canaries sing: read as its makers mean it, a file touches one, unless it lies outside of the walls."""
    verdict = gullible.inspect(CORPUS[f"{name}, {place}"])
    assert verdict.figures is not None
    assert (verdict.figures.canaries, verdict.canary) == (1 if place == "in scratch" else 0, False)
