"""The tables. Documents (specs, facts, problems, reports) are JSON text, read back through their pydantic classes."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

# Constraint names that a later migration can refer to on every database.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in, an aware UTC datetime out, also where the database (SQLite) forgets time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive datetime has no place in the store: give it a time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


uploads = Table(
    "uploads",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("account", String(200), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("filename", Text, nullable=False),
    Column("sha256", String(64), nullable=False, index=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("spec", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("problem", Text),
    Column("facts", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "account", "kind", "id"),
)

# Bytes on their way. A request that sends some holds the row until `held_until` (seconds since the epoch).
resumable_uploads = Table(
    "resumable_uploads",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("account", String(200), nullable=False),
    Column("filename", Text, nullable=False),
    Column("upload_metadata", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("received", BigInteger, nullable=False),
    Column("promised_sha256", String(64)),
    Column("sha256", String(64), index=True),
    Column("finished", Boolean, nullable=False),
    Column("attempt", Integer, nullable=False),  # the fencing token: grows with every request that sends bytes
    Column("held_until", Double),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False, index=True),
    Index(None, "account", "id"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("account", String(200), nullable=False),
    Column("model_id", String(40), nullable=False, index=True),
    Column("dataset_id", String(40), index=True),
    Column("spec", Text, nullable=False),
    Column("resolved", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("progress", Double, nullable=False),
    Column("step", Text),
    Column("attempt", Integer, nullable=False),
    Column("attempt_started_at", UtcDateTime),
    Column("cancel_requested", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("finished_at", UtcDateTime),
    Column("error", Text),
    Column("warnings", Text, nullable=False),
    Column("goal_met", Boolean),
    Column("version", Integer, nullable=False),
    Index(None, "account", "id"),
    Index(None, "state", "id"),
)

# The models that a job names besides its own: teachers and students.
job_models = Table(
    "job_models",
    metadata,
    Column("job_id", String(40), ForeignKey("jobs.id"), primary_key=True),
    Column("model_id", String(40), primary_key=True, index=True),
)

# Apart from the job, which is read at every poll.
reports = Table(
    "reports",
    metadata,
    Column("job_id", String(40), ForeignKey("jobs.id"), primary_key=True),
    Column("report", Text, nullable=False),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("job_id", String(40), ForeignKey("jobs.id"), primary_key=True),
    Column("name", String(255), primary_key=True),
    Column("format", String(40), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("media_type", String(200), nullable=False),
    Column("blob_key", Text, nullable=False),
)

# What workers claim: one row an upload or job, under its id. Times are seconds since the epoch, so that a single
# statement can compare and add them on every database.
work = Table(
    "work",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("state", String(16), nullable=False),  # queued, running, done
    Column("attempt", Integer, nullable=False),  # the fencing token: grows with every claim
    Column("tries", Integer, nullable=False),  # claims that count against the limit: not those handed back
    Column("owner", String(200)),
    Column("lease_until", Double),
    Column("publish_at", Double, nullable=False),
    Column("publish_delay", Double, nullable=False),
    Index(None, "state", "publish_at"),
)

# The parts in an attempt at a job over several hosts: one row a host. Those of others than the first are work.
seats = Table(
    "seats",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("job_id", String(40), ForeignKey("jobs.id"), nullable=False, index=True),
    Column("attempt", Integer, nullable=False),
    Column("host", Integer, nullable=False),
    Column("cards", Text, nullable=False),
    Column("gone", Boolean, nullable=False),
    Column("problem", Text),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("account", String(200), primary_key=True),
    Column("idempotency_key", String(255), primary_key=True),
    Column("fingerprint", String(200)),
    Column("job_id", String(40), ForeignKey("jobs.id"), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("queues", Text, nullable=False),
    Column("last_seen_at", UtcDateTime, nullable=False),
    Column("sandbox", Text),  # none: a worker of an earlier version, which does not say
)

keys = Table(
    "api_keys",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("account", String(200), nullable=False),
    Column("name", Text, nullable=False),
    Column("prefix", String(8), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("last_used_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    UniqueConstraint("prefix"),
)
