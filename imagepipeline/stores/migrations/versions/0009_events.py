"""Events for apps, the webhook's state, and the views that apps read."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

IMAGES = """
CREATE VIEW published_images_v1 AS
SELECT images.id, images.generation, images.status, images.reason, images.error, images.flaw,
    images.width, images.height, images.placeholder, images.dominant_color,
    {description} AS description, {tags} AS tags, {category} AS category, {mood} AS mood,
    images.accepted_at, images.updated_at
FROM images LEFT JOIN image_results AS described
    ON described.image_id = images.id AND described.asset = 'metadata' AND NOT described.is_stale
"""
# Rows are stored before their files, so they count only once a set was complete.
VARIANTS = """
CREATE VIEW published_variants_v1 AS
SELECT image_variants.image_id, image_variants.path, image_variants.format, image_variants.width,
    image_variants.height, image_variants.size AS bytes
FROM image_variants JOIN image_results AS made
    ON made.image_id = image_variants.image_id AND made.asset = 'variants'
"""
# Of the original that is described; a description of an earlier one is none.
READ_TEXT = {
    "sqlite": "CASE WHEN described.asset IS NOT NULL AND json_valid(images.metadata) "
    "THEN json_extract(images.metadata, '$.{name}') END",
    "postgresql": "CASE WHEN described.asset IS NOT NULL THEN images.metadata ->> '{name}' END",
}
READ_LIST = READ_TEXT | {
    "postgresql": "CASE WHEN described.asset IS NOT NULL THEN images.metadata -> '{name}' END",
}


def upgrade() -> None:
    """Creates the tables, their indexes and the views."""
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "events",
        sa.Column("seq", sa.Integer(), nullable=False, autoincrement=True),
        sa.Column("event_id", sa.String(36), nullable=False),
        sa.Column("image_id", sa.String(64), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("at", moment, nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("stream_sent_at", moment),
        sa.Column("webhook_since", moment),
        sa.Column("webhook_due_at", moment),
        sa.Column("webhook_sent_at", moment),
        sa.Column("webhook_died_at", moment),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_events")),
        sa.UniqueConstraint("event_id", name=op.f("uq_events_event_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_events_image_id_seq"), "events", ["image_id", "seq"])
    op.create_index(op.f("ix_events_at"), "events", ["at"])
    for channel, condition in (
        ("stream", sa.text("stream_sent_at IS NULL")),
        ("webhook", sa.text("webhook_since IS NOT NULL")),
    ):
        op.create_index(
            f"ix_events_for_{channel}",
            "events",
            ["seq"],
            sqlite_where=condition,
            postgresql_where=condition,
        )
    op.create_table(
        "event_webhook",
        sa.Column("id", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("due_at", moment, nullable=False),
        sa.Column("problem", sa.String(300)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event_webhook")),
    )
    dialect = op.get_bind().dialect.name
    fields = {
        name: READ_TEXT[dialect].format(name=name) for name in ("description", "category", "mood")
    }
    op.execute(IMAGES.format(**fields, tags=READ_LIST[dialect].format(name="tags")))
    op.execute(VARIANTS)


def downgrade() -> None:
    """Drops them."""
    op.execute("DROP VIEW published_variants_v1")
    op.execute("DROP VIEW published_images_v1")
    op.drop_table("event_webhook")
    op.drop_table("events")
