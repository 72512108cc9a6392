"""What a page shows before the image: size, placeholder, dominant colour; the flaw."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the columns, empty for images done before."""
    op.add_column("images", sa.Column("width", sa.Integer()))
    op.add_column("images", sa.Column("height", sa.Integer()))
    op.add_column("images", sa.Column("placeholder", sa.String(2000)))
    op.add_column("images", sa.Column("dominant_color", sa.String(7)))
    op.add_column("images", sa.Column("flaw", sa.String(300)))
