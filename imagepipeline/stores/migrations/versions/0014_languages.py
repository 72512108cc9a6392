"""Descriptions in several languages, in the view that apps read."""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

VIEW = """
CREATE{replacing} VIEW published_images_v1 AS
SELECT images.id, images.generation, images.status, images.reason, images.error, images.flaw,
    images.width, images.height, images.placeholder, images.dominant_color,
    {description} AS description, {tags} AS tags, {category} AS category, {mood} AS mood,
    images.accepted_at, images.updated_at{added}
FROM images LEFT JOIN image_results AS described
    ON described.image_id = images.id AND described.asset = 'metadata' AND NOT described.is_stale
"""
READ = {
    "sqlite": "CASE WHEN described.asset IS NOT NULL AND json_valid(images.metadata) "
    "THEN json_extract(images.metadata, '$.{name}') END",
    "postgresql": "CASE WHEN described.asset IS NOT NULL THEN images.metadata {arrow} '{name}' END",
}


def upgrade() -> None:
    """Adds the column `languages` to the view; in Postgres, rights and views on it stay."""
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP VIEW published_images_v1")
        create(", {languages} AS languages")
    else:
        create(", {languages} AS languages", " OR REPLACE")


def downgrade() -> None:
    """Removes it."""
    op.execute("DROP VIEW published_images_v1")
    create("")


def create(added: str, replacing: str = "") -> None:
    """Makes the view, with further columns."""
    read = READ[op.get_bind().dialect.name]
    columns = {
        name: read.format(name=name, arrow="->>") for name in ("description", "category", "mood")
    } | {name: read.format(name=name, arrow="->") for name in ("tags", "languages")}
    op.execute(VIEW.format(**columns, added=added.format(**columns), replacing=replacing))
