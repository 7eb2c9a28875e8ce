"""Engine, transactions and migrations: what differs between SQLite and PostgreSQL is here and nowhere else."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import alembic.command
import alembic.config
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url

import app.contract.migrations

# Writers queue for SQLite's one write lock; every transaction here takes milliseconds.
BUSY_SECONDS = 30
# As many connections as anyio has threads, so that requests never queue for one.
POOL_SIZE, POOL_OVERFLOW = 10, 40
# Any number that no other program locks in the same database.
MIGRATION_LOCK = 7_358_071


class StoreBase:
    """Holds the engine and the service's policy on retries; the mixins beside it hold the statements."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_attempts: int = 3,
        republish_seconds: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._writer = engine
        self._reader = _reading(engine)
        self._max_attempts = max_attempts
        self._republish_seconds = republish_seconds
        self._clock = clock

    @classmethod
    def open(cls, database_url: str, *, max_attempts: int = 3, republish_seconds: float = 5.0) -> Self:
        """`sqlite:////absolute/path.db` or `postgresql+psycopg://…`; creates a SQLite file's folder."""
        return cls(make_engine(database_url), max_attempts=max_attempts, republish_seconds=republish_seconds)

    def migrate(self) -> None:
        """Brings the schema to the newest version; processes that start together wait for each other."""
        config = alembic.config.Config()
        config.set_main_option("script_location", str(Path(app.contract.migrations.__file__).parent))
        with self._write() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")

    def ping(self) -> None:
        """Raises where the database does not answer."""
        with self._read() as connection:
            connection.execute(text("SELECT 1"))

    def close(self) -> None:
        """Closes every connection."""
        self._writer.dispose()

    def _read(self) -> Connection:
        return self._reader.connect()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._writer.begin() as connection:
            yield connection

    @staticmethod
    def _lock(connection: Connection, name: str) -> None:
        """Transactions that lock the same name run one after the other; on SQLite all that write do so anyway."""
        if connection.dialect.name == "postgresql":
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)


def make_engine(database_url: str) -> Engine:
    """An engine whose transactions mean the same on both databases."""
    url = make_url(database_url)
    options: dict[str, Any] = {"pool_size": POOL_SIZE, "max_overflow": POOL_OVERFLOW}
    if url.get_backend_name() != "sqlite":
        # A connection that the server closed is noticed before it is used.
        return create_engine(url, pool_pre_ping=True, **options)
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}, **options)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _reading(engine: Engine) -> Engine:
    """The same pool for single SELECTs: no BEGIN and no COMMIT around them."""
    if engine.dialect.name == "sqlite":
        return engine.execution_options(read_only=True)
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def _prepare_sqlite(dbapi: Any, _record: object) -> None:
    dbapi.isolation_level = None  # transactions begin where `_begin_sqlite` says, not where the driver guesses
    cursor = dbapi.cursor()
    _set_wal(cursor)
    cursor.execute("PRAGMA foreign_keys = ON")
    # A job that was acknowledged survives a power cut; NORMAL would keep the file whole but lose the last commits.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _set_wal(cursor: Any) -> None:
    """Switching to WAL does not wait for other connections as other statements do, so it is tried until it works."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except cursor.connection.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _begin_sqlite(connection: Connection) -> None:
    """Takes the write lock at once: a lock taken later, after a read, fails instead of waiting."""
    if not connection.get_execution_options().get("read_only"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
