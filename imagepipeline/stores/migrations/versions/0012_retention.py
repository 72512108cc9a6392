"""What may be pruned: what Dagster has of an image, the sums of calls, and indexes for bounds."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

DAY = {
    "sqlite": "substr(CAST(at AS VARCHAR), 1, 10)",
    "postgresql": "to_char(timezone('UTC', at), 'YYYY-MM-DD')",
}


def upgrade() -> None:
    """Adds the columns, the table `call_sums` with the sums so far, and the indexes."""
    op.add_column("images", sa.Column("in_dagster", sa.String(8)))
    op.add_column("images", sa.Column("in_dagster_since", sa.DateTime(timezone=True)))
    op.add_column("images", sa.Column("pruned_cost_usd", sa.Float()))
    op.execute(
        "UPDATE images SET in_dagster = 'runs', in_dagster_since = updated_at "
        "WHERE run_id IS NOT NULL"
    )
    op.drop_index(op.f("ix_images_status_priority_accepted_at"), "images")
    op.create_index(
        "ix_images_next", "images", ["status", sa.text("priority DESC"), "accepted_at", "id"]
    )
    op.create_index(op.f("ix_images_status_updated_at"), "images", ["status", "updated_at"])
    is_there = sa.text("in_dagster IS NOT NULL")
    op.create_index(
        "ix_images_in_dagster",
        "images",
        ["in_dagster", "in_dagster_since"],
        sqlite_where=is_there,
        postgresql_where=is_there,
    )
    op.create_index(op.f("ix_notifications_failed_at"), "notifications", ["failed_at"])
    numbers = ("calls", "answered", "tokens_in", "tokens_out", "unpriced")
    op.create_table(
        "call_sums",
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("provider", sa.String(64), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False, server_default=""),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in numbers),
        sa.Column("cost_usd", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint(
            *("day", "stage", "provider", "model", "tenant"), name=op.f("pk_call_sums")
        ),
    )
    day = DAY[op.get_bind().dialect.name]
    op.execute(
        f"INSERT INTO call_sums (day, stage, provider, model, {', '.join(numbers)}, cost_usd) "  # noqa: S608
        f"SELECT {day}, stage, provider, model, count(*), "
        "sum(CASE WHEN outcome = 'answered' THEN 1 ELSE 0 END), "
        "coalesce(sum(tokens_in), 0), coalesce(sum(tokens_out), 0), "
        "sum(CASE WHEN cost_usd IS NULL AND tokens_in IS NOT NULL THEN 1 ELSE 0 END), "
        f"coalesce(sum(cost_usd), 0) FROM provider_calls GROUP BY {day}, stage, provider, model"
    )


def downgrade() -> None:
    """Drops them."""
    op.drop_table("call_sums")
    op.drop_index(op.f("ix_notifications_failed_at"), "notifications")
    op.drop_index("ix_images_in_dagster", "images")
    op.drop_index(op.f("ix_images_status_updated_at"), "images")
    op.drop_index("ix_images_next", "images")
    op.create_index(
        op.f("ix_images_status_priority_accepted_at"),
        "images",
        ["status", "priority", "accepted_at"],
    )
    op.drop_column("images", "pruned_cost_usd")
    op.drop_column("images", "in_dagster_since")
    op.drop_column("images", "in_dagster")
