"""Whose original a path is, is asked of each upload that names one."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the indexes."""
    for name in ("requested_path", "path"):
        op.create_index(op.f(f"ix_images_{name}"), "images", [name])


def downgrade() -> None:
    """Drops them."""
    for name in ("requested_path", "path"):
        op.drop_index(op.f(f"ix_images_{name}"), "images")
