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
    process = bench.context().Process(target=_first, args=(size, folder, work, arguments))
    process.start()
    process.join()
    troubles = [path.read_text() for path in sorted(folder.glob("trouble-*"))]
    assert not troubles, "\n".join(troubles)
    assert process.exitcode == 0
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(size)]


def _first(size: int, folder: Path, work: Work, arguments: tuple[Any, ...]) -> None:
    def one(ranks: Ranks) -> None:
        torch.set_num_threads(1)
        try:
            torch.save(work(ranks, *arguments), folder / f"result-{ranks.rank}")
        except Exception:
            (folder / f"trouble-{ranks.rank}").write_text(traceback.format_exc())
        ranks.listed(None)  # until all are done

    with crew(Place(size, folder), one, _problem) as ranks:
        one(ranks)


def _problem(error: Exception) -> Problem:
    return JobFailed(str(error)).problem()
