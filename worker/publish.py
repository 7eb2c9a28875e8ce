"""Moves what a child left in its output folder to the blob store, trusting none of it."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from app.contract.blobs import Blobs, output_prefix
from app.contract.errors import ExportFailed
from app.contract.records import ArtifactRecord, Claim
from worker.messages import Output


def publish(blobs: Blobs, claim: Claim, outputs: Sequence[Output], folder: Path) -> list[ArtifactRecord]:
    """Stores each output under `jobs/<id>/<attempt>/`. Raises ExportFailed for what is not a file of the folder."""
    names = [output.name for output in outputs]
    if len(set(names)) != len(names):
        raise ExportFailed(f"The job delivered two artifacts of one name: {', '.join(sorted(names))}.")
    return [_publish_one(blobs, claim, output, folder) for output in outputs]


def withdraw(blobs: Blobs, claim: Claim) -> None:
    """Removes whatever this attempt has stored."""
    blobs.delete_prefix(output_prefix(claim.work_id, claim.attempt))


def withdraw_earlier(blobs: Blobs, claim: Claim) -> None:
    """Removes what earlier attempts at the job left that were killed while they published."""
    for attempt in range(1, claim.attempt):
        blobs.delete_prefix(output_prefix(claim.work_id, attempt))


def _publish_one(blobs: Blobs, claim: Claim, output: Output, folder: Path) -> ArtifactRecord:
    path = _inside(folder, output)
    try:
        key = blobs.output_key(claim.work_id, claim.attempt, output.name)
    except ValueError as error:
        raise ExportFailed(f"The job delivered an artifact with an unusable name: {error}.") from None
    stored = blobs.put_file(path, key)
    return ArtifactRecord(
        job_id=claim.work_id,
        name=output.name,
        format=output.format,
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        media_type=output.media_type,
        key=key,
    )


def _inside(folder: Path, output: Output) -> Path:
    path = Path(output.path)
    try:
        inside = path.resolve(strict=True).is_relative_to(folder.resolve())
        regular = stat.S_ISREG(path.lstat().st_mode) and path.lstat().st_nlink == 1
    except OSError:
        inside = regular = False
    if not (inside and regular):
        raise ExportFailed(f"The job named {output.name!r} as an artifact, but left no regular file of that name.")
    return path
