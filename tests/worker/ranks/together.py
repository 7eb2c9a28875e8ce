"""Runs a function in connected processes, as the ranks of a job, without walls."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.worker import bench
from worker.ranks.ranks import Group, Ranks

Work = Callable[..., Any]


def together(size: int, folder: Path, work: Work, *arguments: Any) -> list[Any]:
    """What `work` gives in each of them; called with its ranks and the arguments. Importable by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    context = bench.context()
    processes = [context.Process(target=_one, args=(rank, size, folder, work, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    troubles = [path.read_text() for path in sorted(folder.glob("trouble-*"))]
    assert not troubles, "\n".join(troubles)
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(size)]


def _one(rank: int, size: int, folder: Path, work: Work, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        ranks = Ranks() if size == 1 else Group(rank, size, folder)
        torch.save(work(ranks, *arguments), folder / f"result-{rank}")
    except Exception:
        (folder / f"trouble-{rank}").write_text(traceback.format_exc())
