"""Thousands of spoiled files of every format, in batches inside of sandboxed children: each loads or is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.hostile import batches
from tests.hostile.member import Member
from tests.hostile.mutations import SEEDS, Seed
from tests.hostile.service import Service, own_forkserver
from tests.hostile.test_corpus import CPU_SECONDS, MEMORY_BYTES, check_traces

TOTAL = int(os.environ.get("TERSOR_TEST_MUTATIONS", "6000"))
BATCH = 100


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with own_forkserver():
        yield Service(tmp_path_factory.mktemp("mutations"), batches.__name__)


def share(seed: Seed) -> int:
    """How many of all a file gets: fewer where one takes long."""
    return max(1, round(TOTAL / seed.cost / sum(1 / other.cost for other in SEEDS.values())))


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_mutations_load_or_are_refused(service: Service, name: str, record_property: pytest.RecordProperty) -> None:
    seed, wanted = SEEDS[name], share(SEEDS[name])
    tally: dict[str, int] = {}
    for first in range(0, wanted, BATCH):
        spec = {"seed": name, "first": first, "count": min(BATCH, wanted - first)}
        verdict = service.inspect(Member(name, seed.make, "a batch of mutations", spec=spec))
        assert "they have been inspected" in verdict.said, verdict
        check_traces(service, verdict)
        assert verdict.figures is not None
        assert not verdict.figures.faults
        assert verdict.figures.seconds < CPU_SECONDS
        assert verdict.figures.bytes < MEMORY_BYTES
        for outcome, count in verdict.figures.tally.items():
            tally[outcome] = tally.get(outcome, 0) + count
        record_property(f"{name} {first}", str(verdict.figures))
    assert sum(tally.values()) == wanted
