"""Scratch folders: one an attempt, locked by the worker that owns it, gone afterwards.

An attempt's folder holds the inputs, which its child only reads, what the child printed, and `work`, where it writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.contract.records import Claim

WORK = "work"
LOG = "log"
CARDS = "ranks"  # in the folder that the child writes to: what its processes tell all others of the job
OTHERS = "others"  # beside it: what those of other hosts tell
TAIL_BYTES = 4096  # of what a job prints, this much goes to the worker's own log


@contextmanager
def scratch_folder(root: Path, claim: Claim) -> Iterator[Path]:
    """A folder for the attempt, with an empty `work`. Its lock ends with this process, however it ends."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = root / f"{claim.work_id}-{claim.attempt}"
    with _locked(root):
        folder.mkdir(mode=0o700)
        lock = _lock(folder)
    try:
        (folder / WORK).mkdir(mode=0o700)
        yield folder
    finally:
        remove(folder)
        os.close(lock)


def printed(folder: Path) -> str:
    """The end of what the attempt's processes printed, without the control characters that would steer a terminal."""
    try:
        with (folder / LOG).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = log.read(TAIL_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:  # it did not come to that
        return ""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text).strip()


def remove_stale(root: Path) -> int:
    """Removes the folders that no living worker holds; how many there were."""
    removed = 0
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(root):
        for folder in root.iterdir():
            try:
                lock = _lock(folder)
            except BlockingIOError:
                continue
            remove(folder)
            os.close(lock)
            removed += 1
    return removed


def remove(folder: Path) -> None:
    """Removes a folder, also one that was filled to defeat removal: nested deeper than Python's own way can follow.

    What is a file or a link is removed itself; what is not there need not be.
    """
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        subprocess.run(["rm", "-rf", "--", folder], check=False, stdin=subprocess.DEVNULL)  # noqa: S607


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Keeps workers that start from taking a folder that another one is just making for stale."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor
