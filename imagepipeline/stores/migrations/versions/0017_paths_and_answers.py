"""Aliases are found by their path, and calls by the model that answered."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

# Name, table, columns and condition.
INDEXES = (
    ("ix_image_variants_alias_path", "image_variants", ["path"], "is_alias"),
    ("ix_provider_calls_answered", "provider_calls", ["model", "at"], "outcome = 'answered'"),
)


def upgrade() -> None:
    """Adds the indexes."""
    for name, table, columns, condition in INDEXES:
        where = sa.text(condition)
        op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)


def downgrade() -> None:
    """Drops them."""
    for name, table, _, _ in INDEXES:
        op.drop_index(name, table)
