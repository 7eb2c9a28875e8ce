"""Runs a function in the connected processes of a job, without walls."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from app.contract.errors import JobFailed, Problem
from tests.worker import bench
from worker.ranks.crew import crew
from worker.ranks.meeting import Place
from worker.ranks.ranks import Ranks

Work = Callable[..., Any]


def together(size: int, folder: Path, work: Work, *arguments: Any) -> list[Any]:
    """What `work` gives in each of them; called with its ranks and the arguments. Importable by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    return _results([Place(size, folder)], work, arguments)


def apart(hosts: int, processes: int, folder: Path, work: Work, *arguments: Any) -> list[Any]:
    """The same for processes of several hosts, which are all this one. They lay their cards in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return _results([Place(processes, folder, host, hosts) for host in range(hosts)], work, arguments)


def _results(places: list[Place], work: Work, arguments: tuple[Any, ...]) -> list[Any]:
    started = [bench.context().Process(target=_first, args=(place, work, arguments)) for place in places]
    for process in started:
        process.start()
    for process in started:
        process.join()
    folder = places[0].folder
    troubles = [path.read_text() for path in sorted(folder.glob("trouble-*"))]
    assert not troubles, "\n".join(troubles)
    assert all(process.exitcode == 0 for process in started)
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(places[0].size)]


def _first(place: Place, work: Work, arguments: tuple[Any, ...]) -> None:
    folder = place.folder

    def one(ranks: Ranks) -> None:
        torch.set_num_threads(1)
        try:
            torch.save(work(ranks, *arguments), folder / f"result-{ranks.rank}")
        except Exception:
            (folder / f"trouble-{ranks.rank}").write_text(traceback.format_exc())
        ranks.part()

    with crew(place, one, _problem) as ranks:
        one(ranks)


def _problem(error: Exception) -> Problem:
    return JobFailed(str(error)).problem()
