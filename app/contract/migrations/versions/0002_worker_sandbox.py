"""Which walls stand around the jobs of a worker."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Workers of the first version say nothing of it. There is no way down: restore a backup instead."""
    op.add_column("workers", sa.Column("sandbox", sa.Text()))
