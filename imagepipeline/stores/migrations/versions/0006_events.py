"""Asset checks ask for the events of all images of the last day."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the index."""
    op.create_index(op.f("ix_image_history_event_at"), "image_history", ["event", "at"])


def downgrade() -> None:
    """Drops it."""
    op.drop_index(op.f("ix_image_history_event_at"), "image_history")
