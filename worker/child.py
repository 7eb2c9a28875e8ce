"""The inside of a child process: its own group, its limits, its walls, its lifeline, and one piece of work."""

from __future__ import annotations

import errno
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol

from app.contract.errors import JobFailed, OutOfMemory, Problem, ServiceUnavailable, TersorError
from worker.forkserver import scrub_environment
from worker.limits import Limits, apply_in_child
from worker.messages import CheckpointWritten, Failed, Message, Progress, Result, Started
from worker.sandbox import descriptors
from worker.sandbox.enter import enter
from worker.sandbox.policy import Policy
from worker.scratch import LOG, WORK
from worker.vetting.boundary import OUR_TROUBLE, ran_out_of_memory

PROGRESS_SECONDS, PROGRESS_SHARE = 0.2, 0.01


class Report(Protocol):
    """Called by the work with its progress (0..1) and the name of its step."""

    def __call__(self, progress: float, step: str, /) -> None: ...

    def checkpoint(self, kind: Literal["step", "training"], name: str) -> None:
        """Says that a checkpoint of this name lies in the folder to write to."""

    def problem(self, error: Exception) -> Problem:
        """What an error of the work means for a client."""


def main(pipe: Connection, entry: str, request: Any, attempt: Path, limits: Limits, policy: Policy | None) -> None:
    """Runs `entry` ("module:function", called with the request and a `Report`) and sends what comes of it.

    `attempt` is the folder of the attempt; without a policy there are limits, but no walls.
    """
    os.setsid()
    descriptors.redirect_streams(attempt / LOG)
    descriptors.keep_only(pipe.fileno())
    scrub_environment()
    _settle(attempt / WORK)
    apply_in_child(limits)
    voice = _Voice(pipe, limits)
    try:
        work = _imported(entry)
        if policy is not None:
            enter(policy)
    except Exception as error:
        unfit = ServiceUnavailable(f"The worker could not prepare a process for this: {error} Try again later.")
        voice.say(Failed(problem=unfit.problem(), fault=traceback.format_exc()))
        return
    voice.say(Started())
    threading.Thread(target=_watch_lifeline, args=(pipe,), daemon=True).start()
    voice.say(_result_of(work, request, voice, limits))


def _settle(folder: Path) -> None:
    """The folder to write to, for libraries too, which keep caches at home and may ask for a name; how they fork."""
    os.chdir(folder)
    # torch notes its own folder when it is imported, which the server has done.
    for name in ("TMPDIR", "HOME", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ[name] = str(folder)
    tempfile.tempdir = str(folder)
    os.environ["USER"] = os.environ["LOGNAME"] = "tersor"
    # Not by the server that this process came from: what that starts has no walls.
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]  # the worker's own


def _imported(entry: str) -> Callable[[Any, Report], Result]:
    """Imported outside of the walls: it is our code, and may lie where the job has no business."""
    module, function = entry.split(":")
    found: Callable[[Any, Report], Result] = getattr(importlib.import_module(module), function)
    return found


class _Voice:
    """Sends messages from any thread of the child."""

    def __init__(self, pipe: Connection, limits: Limits) -> None:
        self._pipe, self._limits = pipe, limits
        self._lock = threading.Lock()
        self._step, self._said, self._at = "", 0.0, 0.0

    def say(self, message: Message) -> None:
        with self._lock:
            self._pipe.send_bytes(message.model_dump_json().encode())

    def __call__(self, progress: float, step: str, /) -> None:
        """Of what comes sooner than a person could read it, a step's first and what moves on by a percent are said."""
        now = time.monotonic()
        if step == self._step and progress < self._said + PROGRESS_SHARE and now < self._at + PROGRESS_SECONDS:
            return
        self._step, self._said, self._at = step, progress, now
        self.say(Progress(progress=min(1.0, max(0.0, progress)), step=step))

    def checkpoint(self, kind: Literal["step", "training"], name: str) -> None:
        """As in Report."""
        self.say(CheckpointWritten(of=kind, name=name))

    def problem(self, error: Exception) -> Problem:
        """As in Report."""
        return error.problem() if isinstance(error, TersorError) else _error(error, self._limits).problem()


def _watch_lifeline(pipe: Connection) -> None:
    """The supervisor never sends: what can be read is the end of its process, and with it this group ends at once."""
    pipe.poll(None)
    os.killpg(0, signal.SIGKILL)


def _result_of(work: Callable[[Any, Report], Result], request: Any, voice: _Voice, limits: Limits) -> Result:
    try:
        _set_threads(limits.threads)
        return work(request, voice)
    except TersorError as error:
        return Failed(problem=voice.problem(error))
    except Exception as error:
        return Failed(problem=voice.problem(error), fault=traceback.format_exc())


def _set_threads(threads: int) -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _error(error: Exception, limits: Limits) -> TersorError:
    text = str(error)
    if ran_out_of_memory(error):
        return OutOfMemory()
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return JobFailed(f"A file grew beyond {limits.disk_bytes} bytes, the most that this worker lets a job write.")
    if isinstance(error, OSError) and error.errno in OUR_TROUBLE:
        return ServiceUnavailable(f"The worker could not do its work: {error.strerror}. Try again later.")
    return JobFailed(f"{type(error).__name__}: {_without_paths(text)}")


def _without_paths(text: str) -> str:
    """The first line, with every path cut to its last part: what lies where on a worker is nobody's business."""
    line = text.strip().splitlines()[0] if text.strip() else "no details"
    return " ".join(word.rsplit("/", 1)[-1] if "/" in word else word for word in line.split(" "))[:500]
