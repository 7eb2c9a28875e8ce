"""One child process from start to end: what it says, how it ended, and the end of its whole group."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pydantic

from app.contract.errors import ChildCrashed, JobFailed, OutOfMemory
from worker import child
from worker.limits import Limits, members, running
from worker.messages import MAX_MESSAGE_BYTES, CheckpointWritten, Progress, Result, Started, parse
from worker.sandbox.policy import Policy
from worker.watch import Watch

# How often limits and the wish to stop are looked at: a share of the 5 s in which a cancelled job ends.
TICK_SECONDS = 0.2
EXIT_SECONDS = 5.0  # from its last word to its end; afterwards it is killed
KILL_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Task:
    """What a child is to run: `entry` is "module:function", `noun` says what it is in messages to the client.

    `attempt` is the attempt's folder; without a policy the child has no walls around it.
    """

    entry: str
    request: Any
    attempt: Path
    limits: Limits
    policy: Policy | None
    noun: str = "job"


class Stopped(Exception):
    """The child was ended because its supervisor was told to stop."""


class Died(Exception):
    """The child ended without a word; `error` is what this means for a job."""

    def __init__(self, error: JobFailed) -> None:
        super().__init__(error.detail)
        self.error = error


class Child:
    """A child process. Use as a context manager: on the way out its group is gone, whatever happened."""

    def __init__(self, context: ForkServerContext, task: Task) -> None:
        self._task = task
        self._pipe, theirs = context.Pipe(duplex=True)
        self._process = context.Process(
            target=child.main,
            args=(theirs, task.entry, task.request, task.attempt, task.limits, task.policy),
        )
        self._process.start()
        theirs.close()
        self._leads_group = False
        self._watch = Watch(task.attempt, task.limits, task.noun)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGKILL)
        self._process.join()
        self._await_group()
        self._watch.close()
        self._pipe.close()

    @property
    def pid(self) -> int:
        """Of the child, and of its group."""
        assert self._process.pid is not None
        return self._process.pid

    def result(self, heard: Callable[[Progress | CheckpointWritten], None], stop: Callable[[], bool]) -> Result:
        """Waits for the child's last word, passing on what it says meanwhile.

        Raises Stopped when `stop` says so, JobFailed, OutOfMemory and TimedOut at its limits, ServiceUnavailable where
        the disk is full, Died when it ends without a word.
        In each case the child may still run: `end` or leaving the context ends it.
        """
        due = time.monotonic()
        while True:
            if stop():
                raise Stopped
            self._watch.check_time()
            # Not at every word: a child may say thousands, and asking the kernel for its memory holds it up.
            if time.monotonic() >= due:
                if self._leads_group:
                    self._watch.check(self.pid)
                due = time.monotonic() + TICK_SECONDS
            left = max(0.0, due - time.monotonic())
            if self._process.sentinel in wait([self._pipe, self._process.sentinel], left):
                # What it said before it ended is still in the pipe.
                said = self._listen(heard, due)
                if said is None and not self._pipe.poll():
                    raise self._crash()
            elif self._pipe.poll():
                said = self._listen(heard, due)
            else:
                continue
            if said is not None:
                return said

    def end(self, grace_seconds: float) -> None:
        """SIGTERM for the whole group, and SIGKILL for what is left of it after the grace."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while time.monotonic() < deadline and self._alive():
            time.sleep(KILL_POLL_SECONDS)
        self._signal(signal.SIGKILL)

    def _listen(self, heard: Callable[[Progress | CheckpointWritten], None], until: float) -> Result | None:
        """Reads what the pipe holds now, and comes in the meantime, until it is time to look at limits again; the last
        word, if it was among it."""
        while self._pipe.poll() and time.monotonic() < until:
            try:
                message = parse(self._pipe.recv_bytes(MAX_MESSAGE_BYTES))
            except EOFError:
                self._process.join(EXIT_SECONDS)
                raise self._crash() from None
            except (OSError, pydantic.ValidationError) as error:
                raise JobFailed(f"The {self._task.noun}'s process answered with something unreadable.") from error
            if isinstance(message, Started):
                self._leads_group = True
            elif isinstance(message, Progress | CheckpointWritten):
                heard(message)
            else:
                return message
        return None

    def _crash(self) -> Died:
        return Died(self._how_it_died())

    def _how_it_died(self) -> JobFailed:
        noun, code = self._task.noun, self._process.exitcode
        if code == -signal.SIGKILL:
            return OutOfMemory(
                f"The system killed the {noun}'s process, most likely because the machine ran out of memory. "
                "Use a smaller batch size or a larger worker."
            )
        if code is None:
            return ChildCrashed(f"The {noun}'s process stopped talking and was ended.")
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return ChildCrashed(f"The {noun}'s process ended {how} without a word.")

    def _await_group(self) -> None:
        """Until nothing of the group runs: killed processes take a moment, and write to the scratch folder in it."""
        deadline = time.monotonic() + EXIT_SECONDS
        while self._leads_group and running(self.pid) and time.monotonic() < deadline:
            time.sleep(KILL_POLL_SECONDS)

    def _alive(self) -> bool:
        return self._process.is_alive() or (self._leads_group and bool(members(self.pid)))

    def _signal(self, number: signal.Signals) -> None:
        """To the group; to the process alone while it has no group yet."""
        for send, wanted in ((os.killpg, True), (os.kill, self._process.is_alive())):
            if wanted:
                try:
                    send(self.pid, number)
                except ProcessLookupError:
                    continue
