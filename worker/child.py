"""The inside of a child process: its own group, its limits, its lifeline, and one piece of work."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from app.contract.errors import JobFailed, OutOfMemory, ServiceUnavailable, TersorError
from worker.forkserver import scrub_environment
from worker.limits import Limits, apply_in_child
from worker.messages import Failed, Message, Progress, Result, Started
from worker.vetting.boundary import OUR_TROUBLE

Report = Callable[[float, str], None]
"""Called by the work with its progress (0..1) and the name of its step."""

# What torch says where the allocator gave up; there is no exception class for the CPU.
OUT_OF_MEMORY_WORDS = ("can't allocate memory", "out of memory", "cannot allocate memory", "bad_alloc")


def main(pipe: Connection, entry: str, request: Any, scratch: Path, limits: Limits) -> None:
    """Runs `entry` ("module:function", called with the request and a `Report`) and sends what comes of it."""
    os.setsid()
    scrub_environment()
    apply_in_child(limits)
    os.chdir(scratch)
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    voice = _Voice(pipe)
    voice.say(Started())
    threading.Thread(target=_watch_lifeline, args=(pipe,), daemon=True).start()
    voice.say(_result_of(entry, request, voice, limits))


class _Voice:
    """Sends messages from any thread of the child."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def say(self, message: Message) -> None:
        with self._lock:
            self._pipe.send_bytes(message.model_dump_json().encode())

    def progress(self, progress: float, step: str) -> None:
        self.say(Progress(progress=min(1.0, max(0.0, progress)), step=step))


def _watch_lifeline(pipe: Connection) -> None:
    """The supervisor never sends: what can be read is the end of its process, and with it this group ends at once."""
    pipe.poll(None)
    os.killpg(0, signal.SIGKILL)


def _result_of(entry: str, request: Any, voice: _Voice, limits: Limits) -> Result:
    try:
        _set_threads(limits.threads)
        module, function = entry.split(":")
        result: Result = getattr(importlib.import_module(module), function)(request, voice.progress)
    except TersorError as error:
        return Failed(problem=error.problem())
    except Exception as error:
        return Failed(problem=_problem(error, limits).problem(), fault=traceback.format_exc())
    return result


def _set_threads(threads: int) -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _problem(error: Exception, limits: Limits) -> TersorError:
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text.lower() for words in OUT_OF_MEMORY_WORDS):
        return OutOfMemory()
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return JobFailed(f"A file grew beyond {limits.file_bytes} bytes, the most that this worker lets a job write.")
    if isinstance(error, OSError) and error.errno in OUR_TROUBLE:
        return ServiceUnavailable(f"The worker could not do its work: {error.strerror}. Try again later.")
    return JobFailed(f"{type(error).__name__}: {_without_paths(text)}")


def _without_paths(text: str) -> str:
    """The first line, with every path cut to its last part: what lies where on a worker is nobody's business."""
    line = text.strip().splitlines()[0] if text.strip() else "no details"
    return " ".join(word.rsplit("/", 1)[-1] if "/" in word else word for word in line.split(" "))[:500]
