"""Run by Alembic, on the connection that `JobStore.migrate` hands over inside its own transaction."""

from __future__ import annotations

from alembic import context

from app.contract.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite cannot alter a column in place
)
with context.begin_transaction():
    context.run_migrations()
