"""Creates or updates the tables of catalogue and Dagster, and binds the two to each other.

    python -m imagepipeline.instance.migration [--take-over | --check]

`--check` only checks the binding. `--take-over` rebinds a catalogue that belongs to another Dagster
instance. This is a separate process so that its callers need not import Dagster.
"""

import sys
import uuid
from contextlib import closing

import sqlalchemy as sa
from dagster import DagsterInstance
from dagster import __version__ as dagster_version
from dagster_postgres import DagsterPostgresStorage

from imagepipeline.errors import PostponedError, StackError
from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue

TAKE_OVER, CHECK = "--take-over", "--check"
INSTANCE_ID_KEY = "imagepipeline/instance_id"


def main() -> None:
    """Migrates the catalogue and the Dagster instance in DAGSTER_HOME.

    On SQLite, the instance is migrated once per Dagster version. On Postgres, concurrent migrations
    wait for each other.

    Raises:
        SystemExit: The catalogue belongs to another Dagster instance, or does not answer.
    """
    settings = Settings.load()
    if CHECK in sys.argv:
        bind_catalogue(settings)
        return
    try:
        with closing(Catalogue(settings.database_url)) as catalogue:
            catalogue.migrate()
    except sa.exc.DBAPIError as error:
        sys.exit(
            "the catalogue does not answer or refuses the migration "
            f"({type(error.orig).__name__}): check DATABASE_URL"
        )
    except (StackError, PostponedError) as error:
        sys.exit(str(error))
    url = settings.dagster_database_url
    if url is None:  # SQLite: only the supervisor migrates, and its lock makes it the only one
        done = settings.home / "dagster" / f".migrated-{dagster_version}"
        if not done.exists():
            _upgrade()
            done.touch()
    else:
        engine = sa.create_engine(
            url.get_secret_value(), isolation_level="AUTOCOMMIT", hide_parameters=True
        )
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT pg_advisory_lock(hashtext('imagepipeline migrate'))")
            DagsterPostgresStorage(url.get_secret_value())  # creates missing tables
            _upgrade()
    bind_catalogue(settings, is_taken_over=TAKE_OVER in sys.argv)


def bind_catalogue(settings: Settings, is_taken_over: bool = False) -> None:
    """Binds the catalogue to the Dagster instance in DAGSTER_HOME.

    Raises:
        SystemExit: The catalogue belongs to another Dagster instance, or does not answer.
    """
    with DagsterInstance.get() as instance, closing(Catalogue(settings.database_url)) as catalogue:
        try:
            catalogue.check()
            catalogue.bind(read_instance_id(instance), is_taken_over)
        except (StackError, PostponedError) as error:
            sys.exit(str(error))


def read_instance_id(instance: DagsterInstance) -> str:
    """Returns the ID of a Dagster instance, created on first use and kept in Dagster's database."""
    storage = instance.daemon_cursor_storage
    known = storage.get_cursor_values({INSTANCE_ID_KEY})
    if INSTANCE_ID_KEY not in known:
        storage.set_cursor_values({INSTANCE_ID_KEY: str(uuid.uuid4())})
        known = storage.get_cursor_values({INSTANCE_ID_KEY})
    return known[INSTANCE_ID_KEY]


def _upgrade() -> None:
    with DagsterInstance.get() as instance:
        instance.upgrade()


if __name__ == "__main__":
    main()
