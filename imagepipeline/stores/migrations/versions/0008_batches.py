"""Batches of paid calls, and which call was made in one."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the tables and the column."""
    op.create_table(
        "provider_batches",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("provider", sa.String(64), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("file_id", sa.String(128)),
        sa.Column("batch_id", sa.String(128)),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("requests", sa.Integer(), nullable=False),
        sa.Column("answered", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_provider_batches")),
    )
    op.create_index(op.f("ix_provider_batches_ended_at"), "provider_batches", ["ended_at"])
    op.create_table(
        "batch_requests",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("batch", sa.Integer(), nullable=False),
        sa.Column("image_id", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_batch_requests")),
        sa.ForeignKeyConstraint(
            ["batch"], ["provider_batches.seq"], name=op.f("fk_batch_requests_batch")
        ),
    )
    op.create_index(op.f("ix_batch_requests_batch"), "batch_requests", ["batch"])
    op.add_column("provider_calls", sa.Column("batch", sa.Integer()))


def downgrade() -> None:
    """Drops them."""
    op.drop_column("provider_calls", "batch")
    op.drop_table("batch_requests")
    op.drop_table("provider_batches")
