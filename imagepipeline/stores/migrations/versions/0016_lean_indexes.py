"""Indexes have only the rows that are looked for by them, and no key twice."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

UNENDED = "status = 'pending' OR status = 'processing'"
COUNTED = "event = 'claimed' OR event = 'completed' OR event = 'failed' OR event = 'check_failed'"
NEXT = [sa.text("priority DESC"), "accepted_at", "id"]
# Name, table, columns and condition, before and after.
BEFORE = (
    ("ix_images_next", "images", ["status", *NEXT], None),
    ("ix_images_next_of_tenant", "images", ["status", "tenant", *NEXT], None),
    ("ix_images_apply_id_status", "images", ["apply_id", "status"], None),
    ("ix_images_requested_path", "images", ["requested_path"], None),
    ("ix_image_results_input_sha256_asset", "image_results", ["input_sha256", "asset"], None),
    ("ix_image_history_image_id_seq", "image_history", ["image_id", "seq"], None),
    ("ix_image_history_event_at", "image_history", ["event", "at"], None),
)
AFTER = (
    ("ix_images_next", "images", ["status", *NEXT], UNENDED),
    ("ix_images_next_of_tenant", "images", ["status", "tenant", *NEXT], UNENDED),
    ("ix_images_apply_id_status", "images", ["apply_id", "status"], "apply_id IS NOT NULL"),
    ("ix_images_requested_path", "images", ["requested_path"], "requested_path IS NOT NULL"),
    ("ix_image_results_input", "image_results", [sa.text("substr(input_sha256, 1, 16)")], None),
    ("ix_image_history_image_id", "image_history", ["image_id"], None),
    ("ix_image_history_event_at", "image_history", ["event", "at"], COUNTED),
)


def upgrade() -> None:
    """Makes the indexes anew."""
    _replace(BEFORE, AFTER)


def downgrade() -> None:
    """Makes the earlier ones."""
    _replace(AFTER, BEFORE)


def _replace(old: tuple, new: tuple) -> None:  # type: ignore[type-arg]
    for name, table, _, _ in old:
        op.drop_index(name, table)
    for name, table, columns, condition in new:
        where = sa.text(condition) if condition else None
        op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)
