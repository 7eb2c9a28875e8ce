from __future__ import annotations

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from app.contract.store import JobStore
from app.contract.store.base import make_engine
from app.contract.tables import metadata
from tests.contract.stage import at_once


def test_the_migrations_lead_to_the_tables_of_the_code(database_url: str) -> None:
    JobStore.open(database_url).migrate()
    engine = make_engine(database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_processes_that_start_together_migrate_once(database_url: str) -> None:
    def start(_: int) -> None:
        store = JobStore.open(database_url)
        store.migrate()
        store.ping()
        store.close()

    assert at_once(4, start) == [None] * 4


def test_sqlite_is_set_to_keep_what_was_acknowledged(tmp_path) -> None:  # type: ignore[no-untyped-def]
    engine = make_engine(f"sqlite:///{tmp_path}/a/b.db")
    with engine.connect() as connection:
        found = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
    engine.dispose()
