"""What made each variant, whether apps may see it and its name; and the focus of an upload."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

VIEW = """
CREATE{replacing} VIEW published_variants_v1 AS
SELECT image_variants.image_id, image_variants.path, image_variants.format, image_variants.width,
    image_variants.height, image_variants.size AS bytes{further}
FROM image_variants JOIN image_results AS made
    ON made.image_id = image_variants.image_id AND made.asset = 'variants'{condition}
"""

# The ID is `<image_id>-<name>-<format>`.
NAME = (
    "substr(image_variants.id, length(image_variants.image_id) + 2, length(image_variants.id) "
    "- length(image_variants.image_id) - length(image_variants.format) - 2)"
)


def upgrade() -> None:
    """Adds the columns, lengthens the row's ID and lets the view show what is published."""
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    if is_sqlite:  # the table is rebuilt
        op.execute("DROP VIEW published_variants_v1")
    with op.batch_alter_table("image_variants") as table:
        table.alter_column("id", existing_type=sa.String(80), type_=sa.String(96))
        table.add_column(sa.Column("recipe", sa.String(128)))
        table.add_column(
            sa.Column("is_published", sa.Boolean(), nullable=False, server_default=sa.true())
        )
    op.add_column("images", sa.Column("focus", sa.JSON()))
    condition = "\nWHERE image_variants.is_published"
    further = f",\n    {NAME} AS name"
    # In Postgres, rights on the view stay.
    replacing = "" if is_sqlite else " OR REPLACE"
    op.execute(VIEW.format(further=further, condition=condition, replacing=replacing))


def downgrade() -> None:
    """Drops them."""
    op.execute("DROP VIEW published_variants_v1")
    op.drop_column("images", "focus")
    with op.batch_alter_table("image_variants") as table:
        table.drop_column("is_published")
        table.drop_column("recipe")
        table.alter_column("id", existing_type=sa.String(96), type_=sa.String(80))
    op.execute(VIEW.format(further="", condition="", replacing=""))
