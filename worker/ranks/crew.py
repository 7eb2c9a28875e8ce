"""The processes of a job: forked from its own, connected, watched to their end.

This happens before the job reads a byte of an upload, which is when the network closes for all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from pydantic import BaseModel

from app.contract.errors import Problem, RankLost, ServiceUnavailable, TersorError
from worker.limits import PR_SET_PDEATHSIG
from worker.ranks.lines import Gone, pairs
from worker.ranks.meeting import Place
from worker.ranks.ranks import Group, Ranks
from worker.sandbox import descriptors, network

log = logging.getLogger("tersor.job")

# From the first sign that one is gone (its connections close) until the system tells how it ended.
SETTLE_SECONDS = 2.0
PART_SECONDS = 10.0  # to end for processes whose part is over: on another host one may still read from them
POLL_SECONDS = 0.01
MAX_WORDS = 1 << 16  # what a pipe holds while nobody reads
GLOO = "gloo/transport"  # in the text of every error of a connection: it names the line of its source
MAX_DETAIL = 1 << 13  # characters, of at most six bytes in JSON

Work = Callable[[Ranks], None]
Ends = dict[int, socket.socket]
"""Of the lines of one process, by the rank of the other one."""


class RankFailed(TersorError):
    """A process of the job failed by itself, `at` a time of the monotonic clock; its problem is the job's."""

    def __init__(self, problem: Problem, at: float) -> None:
        super().__init__(problem.detail)
        self._problem, self.at = problem, at

    def problem(self) -> Problem:
        """What that process had to say."""
        return self._problem


class LastWords(BaseModel):
    """What a follower says when it fails."""

    problem: Problem
    at: float


@dataclass
class Follower:
    """A forked process, and the pipe by which it says what went wrong. `status` as from waitpid, None while it runs."""

    rank: int
    pid: int
    words: int
    status: int | None = None

    def poll(self) -> int | None:
        """How it ended, if it did."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status

    def error(self) -> TersorError | None:
        """What its end means for the job; None where it runs, or ended well."""
        if not self.poll():
            return None
        said = os.read(self.words, MAX_WORDS)
        if said:
            words = LastWords.model_validate_json(said)
            return RankFailed(words.problem, words.at)
        assert self.status is not None
        code = os.waitstatus_to_exitcode(self.status)
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return RankLost(f"Process {self.rank} of the training ended {how} without a word.")


@contextmanager
def crew(place: Place, follow: Work, problem_of: Callable[[Exception], Problem]) -> Iterator[Ranks]:
    """The first of a host's connected processes, in the calling one; each of the others here runs `follow` and ends.

    On the way out of an error, what another process died of stands in its place, as RankLost or RankFailed: here it is
    only a connection that broke. `problem_of` says what an error means for a client. Raises ServiceUnavailable where
    they do not get connected.
    """
    if place.size == 1:
        yield Ranks()
        return
    ends = pairs(place.processes)
    followers = [_fork(index, place, ends, follow, problem_of) for index in range(1, place.processes)]
    _close(end for own in ends[1:] for end in own.values())
    try:
        yield _connected(0, place, ends[0])
    except Exception as error:
        # An error with a meaning is the job's own, unless another process failed before.
        patience = 0.0 if isinstance(error, TersorError) else SETTLE_SECONDS
        raise _cause(followers, time.monotonic() + patience) or _elsewhere(error, place) or error from error
    else:
        _wait(followers, time.monotonic() + PART_SECONDS)
    finally:
        _end(followers)


def _close(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        each.close()


def _connected(index: int, place: Place, lines: Ends) -> Ranks:
    """Of the process with this number on its host."""
    try:
        made = Group(place.first + index, place, {place.first + other: line for other, line in lines.items()})
        network.close(connections=place.connections)
    except (RuntimeError, OSError) as error:
        raise ServiceUnavailable(
            f"The {place.size} processes of the training could not be connected: {str(error).splitlines()[0]}"
        ) from error
    return made


def _elsewhere(error: Exception, place: Place) -> TersorError | None:
    """What it means that a connection broke while all processes of this host are well; None for any other error."""
    if place.hosts == 1 or isinstance(error, TersorError) or not (isinstance(error, Gone) or GLOO in str(error)):
        return None
    return RankLost(f"Host {place.host} of the training lost its connection to another one.")


def _cause(followers: list[Follower], deadline: float) -> TersorError | None:
    """What the first follower to fail died of; None where all are well, and the trouble is our own.

    Those that fail after it only lost their connections. One that could not say anything comes before them.
    """
    while True:
        errors = [error for follower in followers if (error := follower.error()) is not None]
        if errors:
            return min(errors, key=lambda error: error.at if isinstance(error, RankFailed) else 0.0)
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL_SECONDS)


def _wait(followers: list[Follower], deadline: float) -> None:
    """Until all have ended, or the deadline."""
    while any(follower.poll() is None for follower in followers) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _end(followers: list[Follower]) -> None:
    """None is left behind: their part was over with the last training, or the job fails.

    Where the walls let nobody be signalled, on old kernels, they end with this process.
    """
    for follower in followers:
        if follower.poll() is None:
            with contextlib.suppress(PermissionError):
                os.kill(follower.pid, signal.SIGKILL)
                _, follower.status = os.waitpid(follower.pid, 0)
        os.close(follower.words)


def _fork(
    index: int, place: Place, ends: list[Ends], follow: Work, problem_of: Callable[[Exception], Problem]
) -> Follower:
    parent = os.getpid()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Follower(place.first + index, pid, reading)
    _be(index, place, ends[index], follow, problem_of, writing, parent)


def _be(
    index: int,
    place: Place,
    lines: Ends,
    follow: Work,
    problem_of: Callable[[Exception], Problem],
    words: int,
    parent: int,
) -> NoReturn:
    """The life of a follower. It never returns to what the first process was doing."""
    code = 1
    try:
        _die_with(parent)
        descriptors.keep_only(words, *(line.fileno() for line in lines.values()))
        follow(_connected(index, place, lines))
        code = 0
    except Exception as error:
        log.warning(
            "Process %d of the training failed: %s", place.first + index, "".join(traceback.format_exception(error))
        )
        problem = problem_of(error)
        problem = problem.model_copy(update={"detail": problem.detail[:MAX_DETAIL]})
        os.write(words, LastWords(problem=problem, at=time.monotonic()).model_dump_json().encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with(parent: int) -> None:
    """The kernel ends this process when the first one ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before that
        os._exit(1)
