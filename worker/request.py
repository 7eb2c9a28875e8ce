"""What the supervisor asks of a child process, and what it gets back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.contract.report import Report
from app.contract.spec import ResolvedSpec


@dataclass(frozen=True)
class NamedModel:
    """Another uploaded model that the job's steps name, by its id."""

    id: str
    path: Path
    filename: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class RunRequest:
    """One attempt at a job. Inputs can be read only; `scratch` can be written to, and holds the empty `output`.

    `checkpoints` are those of an earlier attempt, by their kind; new ones are announced `checkpoint_seconds` apart.
    Of a job over several hosts this is the part of `host`, whose processes connect by `interface`; what those of
    others tell comes to `others` within `patience` seconds.
    """

    job_id: str
    spec: ResolvedSpec
    model_path: Path
    model_filename: str
    model_spec: dict[str, Any]
    model_sha256: str
    dataset_path: Path | None
    dataset_filename: str | None
    dataset_spec: dict[str, Any] | None
    scratch: Path
    output: Path
    threads: int
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    checkpoint_seconds: float = 0.0
    named: tuple[NamedModel, ...] = ()
    memory_bytes: int | None = None
    host: int = 0
    others: Path | None = None
    interface: str = ""
    patience: float = 60.0


@dataclass(frozen=True)
class OutputFile:
    """A file that the job delivers; `name` is what the client asks for."""

    path: Path
    name: str
    format: str
    media_type: str


@dataclass(frozen=True)
class RunResult:
    """What a finished job hands back."""

    report: Report
    artifacts: tuple[OutputFile, ...]
