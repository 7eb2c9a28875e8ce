"""What jobs do goes on working behind the walls, on this kernel and on one with the oldest Landlock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.worker.sandbox.cell import Cell

on_old_and_new = pytest.mark.parametrize("kernel", [{}, {"newest_landlock": 1}], ids=["this kernel", "oldest Landlock"])


@on_old_and_new
@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        ("files.devices", "8"),
        ("processes.own_process", "True True True"),
        ("jobs.train", "True"),
        ("jobs.load_in_processes", "True True"),
        ("jobs.pool", "[1, 2, 3]"),
        ("jobs.program", "True"),
        ("jobs.import_transformers", "(1, 2)"),
    ],
)
def test_jobs_go_on_working(cell: Cell, probe: str, expected: str, kernel: dict[str, Any]) -> None:
    assert cell.run(probe, **kernel) == expected


@on_old_and_new
@pytest.mark.parametrize("threads", [1, 0], ids=["one thread", "as many as it likes"])
def test_onnxruntime_goes_on_working(cell: Cell, lenet_int8: Path, threads: int, kernel: dict[str, Any]) -> None:
    assert cell.run("jobs.run_onnx", lenet_int8.read_bytes(), threads, **kernel) == "(1, 10)"
    assert cell.log == ""  # no complaints of its own


@on_old_and_new
def test_the_measurement_of_memory_goes_on_working(cell: Cell, lenet_int8: Path, kernel: dict[str, Any]) -> None:
    assert cell.run("jobs.peak_memory", lenet_int8.read_bytes(), **kernel) == "True"


@on_old_and_new
def test_a_job_does_with_its_own_files_what_it_likes(cell: Cell, kernel: dict[str, Any]) -> None:
    assert cell.run("files.own_scratch", **kernel) == cell.run("files.own_scratch", walls=False) == "te"


@pytest.mark.landlock
def test_the_oldest_landlock_renames_within_a_folder_alone(cell: Cell) -> None:
    assert cell.run("files.rename_elsewhere") == "reached"
    assert cell.run("files.rename_elsewhere", newest_landlock=1) == "refused: EXDEV"


def test_a_job_signals_its_own_processes(cell: Cell) -> None:
    assert cell.run("processes.own_signals") == "-15 2"


@pytest.mark.slow
@on_old_and_new
def test_torch_compile_goes_on_working(cell: Cell, kernel: dict[str, Any]) -> None:
    assert cell.run("jobs.compile_with_gcc", **kernel) == "True"
