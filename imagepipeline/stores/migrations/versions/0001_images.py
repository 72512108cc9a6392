"""The first tables: images, their variants, results and history, and the outbox."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Creates the tables."""
    op.create_table(
        "images",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.String(64)),
        sa.Column("path", sa.String(512)),
        sa.Column("original_bytes", sa.Integer()),
        sa.Column("original_sha256", sa.String(64)),
        sa.Column("metadata", sa.JSON()),
        sa.Column("reason", sa.String(32)),
        sa.Column("error", sa.String(300)),
        sa.Column("not_before", sa.DateTime(timezone=True)),
        sa.Column("beat", sa.Integer(), nullable=False),
        sa.Column("discarded_at", sa.DateTime(timezone=True)),
        sa.Column("accepted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "status IN ('pending', 'processing', 'completed', 'failed')", name="ck_images_status"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_images"),
    )
    op.create_index(
        "ix_images_status_priority_accepted_at", "images", ["status", "priority", "accepted_at"]
    )
    op.create_table(
        "image_variants",
        sa.Column("id", sa.String(80), nullable=False),
        sa.Column("image_id", sa.String(64), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(8), nullable=False),
        sa.Column("path", sa.String(512), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_image_variants"),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_image_variants_image_id"),
        sa.UniqueConstraint("path", name="uq_image_variants_path"),
    )
    op.create_index("ix_image_variants_image_id", "image_variants", ["image_id"])
    op.create_table(
        "image_results",
        sa.Column("image_id", sa.String(64), nullable=False),
        sa.Column("asset", sa.String(16), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("provider", sa.String(64), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("settings", sa.String(128), nullable=False),
        sa.Column("input_sha256", sa.String(64), nullable=False),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("image_id", "asset", name="pk_image_results"),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_image_results_image_id"),
    )
    op.create_table(
        "image_history",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("image_id", sa.String(64), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.String(64)),
        sa.Column("event", sa.String(16), nullable=False),
        sa.Column("detail", sa.String(300)),
        sa.PrimaryKeyConstraint("seq", name="pk_image_history"),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_image_history_image_id"),
    )
    op.create_index("ix_image_history_image_id_seq", "image_history", ["image_id", "seq"])
    op.create_table(
        "notifications",
        sa.Column("image_id", sa.String(64), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("error", sa.String(300), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("failed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("webhook_sent_at", sa.DateTime(timezone=True)),
        sa.Column("mail_sent_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("image_id", "generation", name="pk_notifications"),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_notifications_image_id"),
    )
