"""Models that a job names besides its own: teachers and students."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision: str | None = "0003"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """One table, empty at first: jobs of earlier versions name no other models."""
    op.create_table(
        "job_models",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("model_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_models_job_id"),
        sa.PrimaryKeyConstraint("job_id", "model_id", name="pk_job_models"),
    )
    op.create_index("ix_job_models_model_id", "job_models", ["model_id"])
