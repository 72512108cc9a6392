"""The migrations of the catalogue, run by Alembic with a version table of our own.

In a shared database, the default table `alembic_version` may belong to another program.
"""

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from imagepipeline.errors import StackError
from imagepipeline.stores.tables import schema

VERSION_TABLE = "imagepipeline_version"
READER = "imagepipeline_reader"  # a role of Postgres that may read the views, if it exists
VIEWS = ("published_images_v1", "published_variants_v1")
SHARED_VERSION_TABLE = "alembic_version"  # used by versions up to 0.1.0


def upgrade(connection: sa.Connection) -> None:
    """Brings the tables up to date.

    Raises:
        StackError: a newer version has removed something that this version needs.
    """
    config = Config()
    config.set_main_option("script_location", "imagepipeline.stores:migrations")
    config.attributes["connection"] = connection
    known = {revision.revision for revision in ScriptDirectory.from_config(config).walk_revisions()}
    current = _read_version(connection, VERSION_TABLE)
    if current is None:
        earlier = _read_version(connection, SHARED_VERSION_TABLE)
        if earlier in known and sa.inspect(connection).has_table("image_history"):
            command.stamp(config, earlier)
    elif current not in known:
        _check_newer(connection, current)
        return
    command.upgrade(config, "head")
    _admit_reader(connection)


def _admit_reader(connection: sa.Connection) -> None:
    """Lets the role for apps read the views; each time, as it may be created after them."""
    if connection.dialect.name == "postgresql":
        query = sa.text("SELECT count(*) FROM pg_roles WHERE rolname = :name")
        if connection.execute(query, {"name": READER}).scalar_one():
            connection.exec_driver_sql(f"GRANT SELECT ON {', '.join(VIEWS)} TO {READER}")


def _read_version(connection: sa.Connection, table: str) -> str | None:
    return MigrationContext.configure(
        connection, opts={"version_table": table}
    ).get_current_revision()


def _check_newer(connection: sa.Connection, version: str) -> None:
    """Accepts the tables of a newer version that has only added to them."""
    found = sa.inspect(connection)
    for table in schema.sorted_tables:
        columns = (
            {column["name"] for column in found.get_columns(table.name)}
            if found.has_table(table.name)
            else set()
        )
        missing = sorted(set(table.columns.keys()) - columns)
        if missing:
            raise StackError(
                f"the catalogue's tables are those of a newer version ({version}), without "
                f"{table.name}.{missing[0]}: install that version again, or restore an older backup"
            )
