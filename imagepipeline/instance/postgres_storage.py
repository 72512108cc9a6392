"""Dagster's Postgres storage with a connection pool; the original opens a connection per query.

`imagepipeline migrate` creates the tables, so runs need not check for them.
"""

import functools
from typing import Any, Self

import sqlalchemy as sa
from dagster._serdes import ConfigurableClassData
from dagster_postgres import (
    DagsterPostgresStorage,
    PostgresEventLogStorage,
    PostgresRunStorage,
)

from imagepipeline.instance.event_filter import EventFilter

STATEMENT_TIMEOUT_MS, RECYCLE_SECONDS = 30_000, 3600
# Each process keeps one connection open and may open more for the daemon's and webserver's threads.
MAX_OVERFLOW_CONNECTIONS = 9


class FilteredEventLogStorage(EventFilter, PostgresEventLogStorage):
    """Stores Dagster's events that somebody reads."""


class PooledPostgresStorage(DagsterPostgresStorage):
    """Stores runs, ticks and events in the database at `postgres_url`."""

    def __init__(self, postgres_url: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(postgres_url, should_autocreate_tables=False, inst_data=inst_data)
        self._event_log_storage: Any = FilteredEventLogStorage(
            postgres_url, should_autocreate_tables=False
        )
        for storage in (self.run_storage, self.event_log_storage, self.schedule_storage):
            # Private attributes, because a storage takes no engine as an argument.
            vars(storage)["_engine"] = _get_engine(postgres_url)

    @classmethod
    def config_type(cls) -> Any:
        """Returns the schema of the configuration in `dagster.yaml`."""
        import dagster as dg

        return {"postgres_url": dg.StringSource}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> Self:
        """Returns the storage that `dagster.yaml` configures."""
        return cls(inst_data=inst_data, **config_value)


@functools.cache
def _get_engine(postgres_url: str) -> sa.Engine:
    """Returns this process's engine for a URL, which all its instances of Dagster share.

    The code server makes an instance for each tick, and leaves its connections open.
    """
    storage = PostgresRunStorage(postgres_url, should_autocreate_tables=False)
    storage.optimize_for_webserver(STATEMENT_TIMEOUT_MS, RECYCLE_SECONDS, MAX_OVERFLOW_CONNECTIONS)
    engine: sa.Engine = vars(storage)["_engine"]
    return engine
