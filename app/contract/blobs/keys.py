"""Where things lie in the blob store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from uuid import uuid4

UPLOAD_ID = re.compile(r"upl_[0-9a-z]{26}")
OUTPUT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Stored:
    """What was written."""

    sha256: str
    size_bytes: int


def blob_key(sha256: str) -> str:
    """An uploaded file, by its content: two characters of folder, so that no folder grows too large."""
    return f"blobs/sha256/{sha256[:2]}/{sha256[2:]}"


def output_key(job_id: str, attempt: int, name: str) -> str:
    """A file that one attempt at a job writes; raises ValueError for a name that is not a plain file name."""
    if OUTPUT_NAME.fullmatch(name) is None:
        raise ValueError(f"an output is named by letters, digits, dot, dash and underscore; got {name!r}")
    return f"{output_prefix(job_id, attempt)}{name}"


def output_prefix(job_id: str, attempt: int) -> str:
    """Everything that one attempt at a job writes."""
    return f"jobs/{job_id}/{attempt}/"


def checkpoint_key(job_id: str, attempt: int, kind: str) -> str:
    """The newest checkpoint of a kind that one attempt at a job has stored."""
    return f"{checkpoint_prefix(job_id)}{attempt}/{kind}"


def checkpoint_prefix(job_id: str) -> str:
    """Every checkpoint of a job. Apart from its outputs: the next attempt removes those, and needs these."""
    return f"{CHECKPOINTS}{job_id}/"


def incoming_key() -> str:
    """A place of its own for bytes whose digest is not known yet."""
    return f"{INCOMING}{uuid4().hex}"


def partial_key(upload_id: str) -> str:
    """A resumable upload that is one growing file; raises ValueError for what is no id."""
    if UPLOAD_ID.fullmatch(upload_id) is None:
        raise ValueError(f"an upload's id is upl_ and 26 characters; got {upload_id!r}")
    return f"{PARTIAL}{upload_id}"


def partial_prefix(upload_id: str) -> str:
    """A resumable upload that is many objects."""
    return f"{partial_key(upload_id)}/"


def part_key(prefix: str, start: int, attempt: int) -> str:
    """One of them: where in the upload it begins, and who wrote it; they sort by both."""
    return f"{prefix}{start:020d}-{attempt:010d}"


def parse_part(key: str) -> tuple[int, int]:
    """Start and attempt of such a key."""
    start, attempt = key.rpartition("/")[2].split("-")
    return int(start), int(attempt)


CHECKPOINTS = "checkpoints/"
INCOMING = "incoming/"
PARTIAL = "uploads/"
DELETE_BATCH = 1000  # S3 deletes no more in one request
