"""The processes of a job: what becomes of it when one of them ends, and of them when it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worker.ranks import works
from tests.worker.ranks.together import together
from worker.ranks.crew import crew
from worker.ranks.meeting import Place
from worker.ranks.ranks import Ranks

LOST = "rank_lost None: Process 2 of the training ended"


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("nothing", "3; 0 left"),
        ("ends", f"{LOST} with exit code 3 without a word.; 0 left"),
        ("is killed", f"{LOST} by signal SIGKILL without a word.; 0 left"),
        ("refuses", "invalid_spec /steps/1: a bad spec; 0 left"),
        ("fails", "job_failed None: an error of ours; 0 left"),
        ("first fails", "invalid_spec /steps/0: no good; 0 left"),
    ],
)
def test_what_becomes_of_a_job(what: str, expected: str, tmp_path: Path) -> None:
    folder = tmp_path / "crew"
    folder.mkdir()
    assert together(1, tmp_path, works.crewed, folder, what) == [expected]


def test_who_lags_is_waited_for(tmp_path: Path) -> None:
    """All part together, and those of a host end before its first one goes on."""
    folder = tmp_path / "crew"
    folder.mkdir()
    assert together(1, tmp_path, works.crewed, folder, "lags") == ["3; 0 left"]
    assert len(list(folder.glob("over-*"))) == 2


def test_a_job_of_one_process_starts_no_other(tmp_path: Path) -> None:
    def follow(ranks: Ranks) -> None:
        raise AssertionError

    def problem_of(error: Exception) -> None:
        raise AssertionError

    with crew(Place(1, tmp_path), follow, problem_of) as ranks:  # type: ignore[arg-type]
        assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
    assert not any(tmp_path.iterdir())
