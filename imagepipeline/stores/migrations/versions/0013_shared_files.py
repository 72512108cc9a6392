"""Variants of the same pixels share a file; apps are told of each file once."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

VIEW = """
CREATE{replacing} VIEW published_variants_v1 AS
SELECT image_variants.image_id, image_variants.path, image_variants.format, image_variants.width,
    image_variants.height, image_variants.size AS bytes,
    {name} AS name
FROM image_variants JOIN image_results AS made
    ON made.image_id = image_variants.image_id AND made.asset = 'variants'
WHERE image_variants.is_published{condition}"""
# As in 0011: the ID is `<image_id>-<name>-<format>`.
NAME = (
    "substr(image_variants.id, length(image_variants.image_id) + 2, length(image_variants.id) "
    "- length(image_variants.image_id) - length(image_variants.format) - 2)"
)
# Of results that an earlier version made, the first name (-sm after -md after -lg) is published;
# their files stay where they are.
MARK = """
UPDATE image_variants SET is_alias = TRUE WHERE EXISTS (
    SELECT 1 FROM image_variants AS first WHERE first.image_id = image_variants.image_id
    AND first.format = image_variants.format AND first.width = image_variants.width
    AND first.height = image_variants.height AND first.size = image_variants.size
    AND first.path > image_variants.path
)"""


def upgrade() -> None:
    """Adds the column, and lets rows of one image name the same path."""
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    if is_sqlite:  # the table is rebuilt
        op.execute("DROP VIEW published_variants_v1")
    with op.batch_alter_table("image_variants") as table:
        table.add_column(
            sa.Column("is_alias", sa.Boolean(), nullable=False, server_default=sa.false())
        )
        table.drop_constraint("uq_image_variants_path", type_="unique")
    op.execute(MARK)
    op.create_index(
        "uq_image_variants_path",
        "image_variants",
        ["path"],
        unique=True,
        sqlite_where=sa.text("NOT is_alias"),
        postgresql_where=sa.text("NOT is_alias"),
    )
    # In Postgres, rights on the view stay.
    replacing = "" if is_sqlite else " OR REPLACE"
    op.execute(
        VIEW.format(name=NAME, condition=" AND NOT image_variants.is_alias", replacing=replacing)
    )


def downgrade() -> None:
    """Drops what shares a file, and the column."""
    op.execute("DROP VIEW published_variants_v1")
    op.drop_index("uq_image_variants_path", "image_variants")
    op.execute("DELETE FROM image_variants WHERE is_alias")
    with op.batch_alter_table("image_variants") as table:
        table.drop_column("is_alias")
        table.create_unique_constraint("uq_image_variants_path", ["path"])
    op.execute(VIEW.format(name=NAME, condition="", replacing=""))
