"""Erased images: where their generations and fencing tokens go on if they are pushed again."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the table `erasures`."""
    op.create_table(
        "erasures",
        sa.Column("image_id", sa.String(64), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("erased_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("image_id", name=op.f("pk_erasures")),
    )


def downgrade() -> None:
    """Drops it."""
    op.drop_table("erasures")
