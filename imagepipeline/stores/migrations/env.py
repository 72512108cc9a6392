"""Runs the migrations on the connection that `Catalogue.migrate` hands over."""

from alembic import context

from imagepipeline.stores.tables import schema

context.configure(connection=context.config.attributes["connection"], target_metadata=schema, render_as_batch=True)
context.run_migrations()
