"""The last line: what a hostile file provokes inside a library ends as a refusal, never as a crash."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator

from app.contract.errors import TersorError

logger = logging.getLogger(__name__)

# A full disk, a failing one, too many open files: no fault of the upload, and another attempt may succeed.
OUR_TROUBLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE})
# What torch and ONNX Runtime say where an allocator gave up; for memory of the CPU they have no class of exception.
OUT_OF_MEMORY_WORDS = ("allocate memory", "out of memory", "bad_alloc")
MAX_REASON = 300  # characters of a library's message that are passed on


@contextlib.contextmanager
def refusing(error: type[TersorError], filename: str, what: str) -> Iterator[None]:
    """Turns every exception but the error tree's own into `error`; `what` is "a model" or "a dataset".

    The foreseen faults have sentences of their own where they are found; this is for the others, which are logged with
    their traceback because one of them may be a fault of ours.
    """
    try:
        yield
    except TersorError:
        raise
    except OSError as failure:
        if failure.errno in OUR_TROUBLE:
            raise
        raise _unforeseen(failure, error, filename, what) from failure
    except Exception as failure:
        raise _unforeseen(failure, error, filename, what) from failure


def _unforeseen(failure: Exception, error: type[TersorError], filename: str, what: str) -> TersorError:
    logger.warning("unforeseen refusal of %r", filename, exc_info=failure)
    return error(f"{filename!r} cannot be read as {what}: {first_line(failure)}")


def first_line(failure: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none; without local paths."""
    if ran_out_of_memory(failure) and not _says_how_much(failure):
        return "it takes more memory than this worker grants."
    lines = str(failure).strip().splitlines()
    words = (lines[0] if lines else "").split(" ")
    said = " ".join("…" if word.lstrip("'\"(").startswith("/") else word for word in words)[:MAX_REASON]
    return f"{type(failure).__name__}: {said}" if said else type(failure).__name__


def ran_out_of_memory(failure: BaseException) -> bool:
    """Whether an exception of whatever library says that there was no more memory to be had."""
    said = str(failure).lower()
    return isinstance(failure, MemoryError) or any(words in said for words in OUT_OF_MEMORY_WORDS)


def _says_how_much(failure: BaseException) -> bool:
    """Python's own error has no message; those that are raised for one demand name it."""
    return isinstance(failure, MemoryError) and bool(str(failure))
