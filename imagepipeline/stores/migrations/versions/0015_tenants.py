"""Tenants: whose upload an image is, and whose call a call was."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

BY_TENANT = {
    "images": ["status", "tenant", "priority", "accepted_at"],
    "provider_calls": ["tenant", "at"],
}


def upgrade() -> None:
    """Adds the column `tenant` to images and calls; none is named yet."""
    for table, columns in BY_TENANT.items():
        tenant = sa.Column("tenant", sa.String(64), nullable=False, server_default="")
        op.add_column(table, tenant)
        op.create_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table, columns)


def downgrade() -> None:
    """Removes it."""
    for table, columns in BY_TENANT.items():
        op.drop_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table)
        op.drop_column(table, "tenant")
