"""Dagster's own Postgres storage, with one connection that stays open; as shipped, every query opens one.

The tables are made by `imagepipeline migrate`, so that a run need not look for them.
"""

from typing import Any, Self

from dagster._serdes import ConfigurableClassData
from dagster_postgres import DagsterPostgresStorage

STATEMENT_TIMEOUT_MS, RECYCLE_SECONDS = 30_000, 3600
# A process keeps one, and may open so many more while threads of the daemon or the webserver are at work.
MAX_MORE_CONNECTIONS = 9


class PooledPostgresStorage(DagsterPostgresStorage):
    """Runs, ticks and events in the database at `postgres_url`."""

    def __init__(self, postgres_url: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(postgres_url, should_autocreate_tables=False, inst_data=inst_data)
        self.run_storage.optimize_for_webserver(
            STATEMENT_TIMEOUT_MS, RECYCLE_SECONDS, MAX_MORE_CONNECTIONS
        )
        for storage in (self.event_log_storage, self.schedule_storage):
            vars(storage)["_engine"] = vars(self.run_storage)[
                "_engine"
            ]  # private: there is no way to give it one

    @classmethod
    def config_type(cls) -> Any:
        """What `dagster.yaml` must say of it."""
        import dagster as dg

        return {"postgres_url": dg.StringSource}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> Self:
        """The storage that `dagster.yaml` names."""
        return cls(inst_data=inst_data, **config_value)
