"""What an image needs: stale results, results by recipe and by input, answers not yet in place."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the table `answers`, the column `is_stale` and the indexes."""
    op.add_column(
        "images",
        sa.Column("accepted_generation", sa.Integer(), nullable=False, server_default="0"),
    )
    op.execute("UPDATE images SET accepted_generation = generation WHERE status <> 'completed'")
    op.create_table(
        "answers",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_answers")),
    )
    op.create_index(op.f("ix_answers_at"), "answers", ["at"])
    op.add_column(
        "image_results",
        sa.Column("is_stale", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    op.execute(
        "UPDATE image_results SET is_stale = true WHERE asset IN ('metadata', 'variants') AND "
        "input_sha256 <> (SELECT original_sha256 FROM images WHERE images.id = image_id)"
    )
    op.create_index(
        op.f("ix_image_results_asset_provider_model_settings_is_stale"),
        "image_results",
        ["asset", "provider", "model", "settings", "is_stale"],
    )
    op.create_index(
        op.f("ix_image_results_input_sha256_asset"), "image_results", ["input_sha256", "asset"]
    )
    op.create_index(op.f("ix_image_history_event_at"), "image_history", ["event", "at"])


def downgrade() -> None:
    """Drops them."""
    op.drop_index(op.f("ix_image_history_event_at"), "image_history")
    op.drop_index(op.f("ix_image_results_input_sha256_asset"), "image_results")
    op.drop_index(op.f("ix_image_results_asset_provider_model_settings_is_stale"), "image_results")
    op.drop_column("image_results", "is_stale")
    op.drop_table("answers")
    op.drop_column("images", "accepted_generation")
