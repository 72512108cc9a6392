"""Dagster's Postgres storage with a connection pool; the original opens a connection per query.

`imagepipeline migrate` creates the tables, so runs need not check for them.
"""

from typing import Any, Self

from dagster._serdes import ConfigurableClassData
from dagster_postgres import DagsterPostgresStorage

STATEMENT_TIMEOUT_MS, RECYCLE_SECONDS = 30_000, 3600
# Each process keeps one connection open and may open more for the daemon's and webserver's threads.
MAX_OVERFLOW_CONNECTIONS = 9


class PooledPostgresStorage(DagsterPostgresStorage):
    """Stores runs, ticks and events in the database at `postgres_url`."""

    def __init__(self, postgres_url: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(postgres_url, should_autocreate_tables=False, inst_data=inst_data)
        self.run_storage.optimize_for_webserver(
            STATEMENT_TIMEOUT_MS, RECYCLE_SECONDS, MAX_OVERFLOW_CONNECTIONS
        )
        for storage in (self.event_log_storage, self.schedule_storage):
            # Private attributes, because a storage takes no engine as an argument.
            vars(storage)["_engine"] = vars(self.run_storage)["_engine"]

    @classmethod
    def config_type(cls) -> Any:
        """Returns the schema of the configuration in `dagster.yaml`."""
        import dagster as dg

        return {"postgres_url": dg.StringSource}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> Self:
        """Returns the storage that `dagster.yaml` configures."""
        return cls(inst_data=inst_data, **config_value)
