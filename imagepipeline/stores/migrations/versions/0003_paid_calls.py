"""Paid calls with their cost, and pauses."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Creates the tables."""
    op.create_table(
        "provider_calls",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("image_id", sa.String(64)),
        sa.Column("generation", sa.Integer()),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("provider", sa.String(64), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("outcome", sa.String(32), nullable=False),
        sa.Column("tokens_in", sa.Integer()),
        sa.Column("tokens_out", sa.Integer()),
        sa.Column("cost_usd", sa.Float()),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("waited_seconds", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_provider_calls"),
    )
    op.create_index("ix_provider_calls_at", "provider_calls", ["at"])
    op.create_index(
        "ix_provider_calls_image_id_generation", "provider_calls", ["image_id", "generation"]
    )
    op.create_table(
        "pauses",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("stage", sa.String(16)),
        sa.Column("message", sa.String(300), nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True)),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("webhook_sent_at", sa.DateTime(timezone=True)),
        sa.Column("mail_sent_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("seq", name="pk_pauses"),
    )
