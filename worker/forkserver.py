"""The fork server: a process with torch in memory and no secrets, from which a child starts in milliseconds."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

# What a child must not know: where the database, the broker and the blobs are, and every credential for them.
SECRET_PREFIXES = ("TERSOR_", "AWS_", "GOOGLE_", "AZURE_", "PG", "REDIS_")


def context(preload: str = "worker.preload") -> ForkServerContext:
    """The multiprocessing context whose children come from the fork server."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([preload])
    return made


def warm(made: ForkServerContext, preload: str = "worker.preload") -> None:
    """Returns once a child has started and ended, so that the first job does not wait for the imports.

    Raises ImportError where the preload cannot be imported: the fork server alone would swallow it and every child
    would be slow. Call it while the process has one thread: the environment is without secrets for a moment.
    """
    with _no_secrets():
        forkserver.ensure_running()
    child = made.Process(target=importlib.import_module, args=(preload,))
    child.start()
    child.join()
    if child.exitcode:
        raise ImportError(f"{preload} cannot be imported; the traceback above says why")


def scrub_environment() -> dict[str, str]:
    """Removes every secret from the environment of this process, and gives what was removed."""
    return {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(SECRET_PREFIXES)}


@contextmanager
def _no_secrets() -> Iterator[None]:
    removed = scrub_environment()
    try:
        yield
    finally:
        os.environ.update(removed)
