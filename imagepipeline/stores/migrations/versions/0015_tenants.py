"""Tenants: whose upload an image is."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

INDEX = "ix_images_next_of_tenant"


def upgrade() -> None:
    """Adds the column `tenant`; none is named yet."""
    op.add_column("images", sa.Column("tenant", sa.String(64), nullable=False, server_default=""))
    op.create_index(
        INDEX, "images", ["status", "tenant", sa.text("priority DESC"), "accepted_at", "id"]
    )


def downgrade() -> None:
    """Removes it."""
    op.drop_index(INDEX, "images")
    op.drop_column("images", "tenant")
