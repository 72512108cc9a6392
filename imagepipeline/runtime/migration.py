"""Dagster's tables, created or brought up to date: `python -m imagepipeline.runtime.migration`.

A process of its own, because whoever asks for it should not have to import Dagster.
"""

import sqlalchemy as sa
from dagster import DagsterInstance
from dagster_postgres import DagsterPostgresStorage

from imagepipeline.settings import Settings


def main() -> None:
    """Migrates the instance of DAGSTER_HOME; while another process does, it waits."""
    url = Settings.load().dagster_database_url
    if url is None:  # SQLite: only the supervisor is there, and it has a lock of its own
        _upgrade()
        return
    engine = sa.create_engine(url.get_secret_value(), isolation_level="AUTOCOMMIT", hide_parameters=True)
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT pg_advisory_lock(hashtext('imagepipeline migrate'))")
        DagsterPostgresStorage(url.get_secret_value())  # makes the tables where there are none
        _upgrade()


def _upgrade() -> None:
    with DagsterInstance.get() as instance:
        instance.upgrade()


if __name__ == "__main__":
    main()
