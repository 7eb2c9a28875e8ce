"""A worker's supervisor with the real inspection behind it, and a look at all that an upload may have touched."""

from __future__ import annotations

import logging
import multiprocessing.forkserver
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.contract.queue import Doorbell
from app.contract.records import UploadRecord
from tests.hostile import watched
from tests.hostile.member import CANARY, Member
from tests.hostile.watched import Figures
from tests.worker import bench
from worker import forkserver
from worker.supervise import Entries, Supervisor

# A guard against what hangs, far above what is asserted: other work may share the machine's cores.
SECONDS = 300.0
# Beyond it the supervisor ends the child before the machine suffers.
MEMORY_BYTES = 3 << 30


@dataclass(frozen=True)
class Verdict:
    """What came of a member: its record, what the child told of itself, and the paths that appeared."""

    record: UploadRecord
    figures: Figures | None
    appeared: frozenset[str]
    canary: bool

    @property
    def said(self) -> str:
        return "" if self.record.problem is None else self.record.problem.detail


class Service:
    """Takes members one by one. `folder` holds the service's data and, beside them, the canaries.

    A child runs `entry` of `module`, which the fork server has in memory.
    """

    def __init__(self, folder: Path, module: str = watched.__name__, entry: str = "inspection") -> None:
        self.folder, self.canary = folder, folder / "outside" / CANARY
        self.canary.parent.mkdir()
        self.bench = bench.Bench(folder / "data", inspect_timeout_seconds=SECONDS, job_memory_bytes=MEMORY_BYTES)
        self.bench.settings.scratch.mkdir()
        context = forkserver.context(module)
        forkserver.warm(context, module)
        settings, store, blobs = self.bench.settings, self.bench.store, self.bench.blobs
        entries = Entries(inspection=f"{module}:{entry}")
        self.supervisor = Supervisor(settings, store, blobs, Doorbell(settings.broker), context, entries)

    def inspect(self, member: Member) -> Verdict:
        """One upload, from its bytes to its verdict."""
        upload = self.bench.upload(member.make(self.canary), member.kind, member.filename, member.spec)
        before = self._paths()
        with _printed() as printed:
            self.supervisor.run(self.bench.claim(upload.id))
        record = self.bench.store.get_upload(bench.ACCOUNT, upload.id)
        appeared = frozenset(self._paths() - before)
        figures = watched.parsed(printed[-1]) if printed else None
        return Verdict(record, figures, appeared, self.canary.exists())

    def forget(self, upload: UploadRecord) -> None:
        """Removes the bytes of an upload that is ready."""
        self.bench.blobs.delete(self.bench.blobs.blob_key(upload.sha256))

    def _paths(self) -> set[str]:
        """All but the database's own files, which SQLite makes and removes as it likes."""
        found = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*"))
        return {path for path in found if not path.startswith("data/tersor.db")}


@contextmanager
def _printed() -> Iterator[list[str]]:
    """What children print, which the supervisor passes on to its log."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "printed" in record.msg and isinstance(record.args, tuple):
                lines.append(str(record.args[1]))

    log, listener = logging.getLogger("tersor.supervise"), Listener()
    level = log.level
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.setLevel(level)
        log.removeHandler(listener)


@contextmanager
def own_forkserver() -> Iterator[None]:
    """A process has one fork server, and other tests preload other things into it: theirs starts again afterwards."""
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]  # there is no public way to end it
    server._stop()
    bench.context.cache_clear()
    try:
        yield
    finally:
        server._stop()
