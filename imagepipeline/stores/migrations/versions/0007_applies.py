"""Applies: what people have asked to be made of a plan, and which images belong to it."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the table `applies`, and the column and index that link images to it."""
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "applies",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("began_at", moment, nullable=False),
        sa.Column("ended_at", moment),
        sa.Column("end_reason", sa.String(16)),
        sa.Column("expires_at", moment),
        sa.Column("max_images", sa.Integer()),
        sa.Column("budget_usd", sa.Float()),
        sa.Column("recipes", sa.JSON(), nullable=False),
        sa.Column("conditions", sa.Text(), nullable=False),
        sa.Column("begun_count", sa.Integer(), nullable=False),
        sa.Column("last_id", sa.String(64), nullable=False),
        sa.Column("spent_usd", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_applies")),
    )
    op.create_index(op.f("ix_applies_ended_at"), "applies", ["ended_at"])
    op.add_column("images", sa.Column("apply_id", sa.Integer()))
    op.create_index(op.f("ix_images_apply_id_status"), "images", ["apply_id", "status"])


def downgrade() -> None:
    """Drops them."""
    op.drop_index(op.f("ix_images_apply_id_status"), "images")
    op.drop_column("images", "apply_id")
    op.drop_table("applies")
