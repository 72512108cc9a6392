"""Pushes of an image that waits or runs, the path an upload named, and the catalogue's owner."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds columns with defaults, so that the version before can go on writing rows."""
    op.add_column("images", sa.Column("pushes", sa.Integer(), nullable=False, server_default="0"))
    op.add_column(
        "images", sa.Column("pushes_seen", sa.Integer(), nullable=False, server_default="0")
    )
    op.add_column("images", sa.Column("requested_path", sa.String(512)))
    # A path that is not the one a bare ID means was named by the upload.
    op.execute(
        "UPDATE images SET requested_path = path "
        "WHERE substr(path, 1, length(id) + 10) <> 'original/' || id || '.'"
    )
    op.create_table(
        "catalogue_owner",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("dagster_instance_id", sa.String(64), nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_catalogue_owner"),
    )
