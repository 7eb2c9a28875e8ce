"""Silence around libraries that print, warn and log about matters of their own; what goes wrong they raise."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def hushed(name: str, level: int) -> Iterator[None]:
    """The log `name` keeps what is below `level` to itself until the block ends."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing goes to standard output or to the logs below ERROR, and no warning is shown, until the block ends."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)
