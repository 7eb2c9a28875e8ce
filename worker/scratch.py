"""Scratch folders: one an attempt, locked by the worker that owns it, gone afterwards."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.contract.records import Claim


@contextmanager
def scratch_folder(root: Path, claim: Claim) -> Iterator[Path]:
    """An empty folder for the attempt. Its lock ends with this process, however it ends."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = root / f"{claim.work_id}-{claim.attempt}"
    with _locked(root):
        folder.mkdir(mode=0o700)
        lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


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
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            removed += 1
    return removed


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
