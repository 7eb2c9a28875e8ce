"""What an uploaded file is: asked once, in a process of its own, before any job may use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.contract.facts import DatasetFacts, ModelFacts
from worker.data import open_data
from worker.loading import load_model


def inspect_upload(
    kind: str, path: Path, filename: str, spec: dict[str, Any], scratch: Path
) -> ModelFacts | DatasetFacts:
    """The facts of a "model" or a "dataset". Raises ModelRejected or DatasetRejected; writes under `scratch` alone."""
    if kind == "model":
        return load_model(path, filename, spec, scratch).facts
    return open_data(path, filename, spec, scratch).facts
