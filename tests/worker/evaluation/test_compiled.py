"""What compiling a program is worth is asked only where it can be found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worker.evaluation import compiled
from worker.evaluation.memory import Probe, make_probe


def probe(folder: Path) -> Probe:
    (folder / "program.pt2").write_bytes(b"no program")
    return make_probe(folder / "program.pt2", "program.pt2", {}, [], folder, 1, reader="program")


def test_where_memory_would_not_do_it_is_left_out(tmp_path: Path) -> None:
    found = compiled.measure_compiled(probe(tmp_path), None, 256 << 20)
    assert found == "compiling would take more memory than the 256 MiB that a job has on this worker"


def test_a_worker_without_a_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.evaluation.compiled.shutil.which", lambda name: None)
    assert compiled.measure_compiled(probe(tmp_path), None) == "this worker has no C++ compiler (g++ or clang++)"


def test_what_goes_wrong_is_said_in_a_line_without_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(argument: str) -> dict[str, Any]:
        raise RuntimeError(f"{tmp_path}/a.cpp is not C++\nand pages of advice")

    monkeypatch.setattr(compiled, "main", fails)
    assert compiled.answer("[]") == {"failed": "RuntimeError: … is not C++"}


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    """The file is no program, which the process finds."""
    found = compiled.measure_compiled(probe(tmp_path), None)
    assert isinstance(found, str)
    assert found.startswith("this worker could not compile it (")
    assert json.dumps(found).count("\\n") == 0
