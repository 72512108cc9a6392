"""Runs the migrations on the connection that `migrations.upgrade` hands over."""

from alembic import context

from imagepipeline.stores.migrations import VERSION_TABLE
from imagepipeline.stores.tables import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema,
    render_as_batch=True,
    version_table=VERSION_TABLE,
)
context.run_migrations()
