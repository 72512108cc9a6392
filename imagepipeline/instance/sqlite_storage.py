"""Dagster's SQLite storages with pooled connections and a single database for all events.

The original storages create an engine per query, which compiles every statement again, and a
database per run, which Alembic creates and stamps. Together this took most of a run's CPU time
(docs/decisions/0008-warm-processes.md). Tables and statements are unchanged. `imagepipeline up`
configures this storage in its `dagster.yaml`; without that entry, Dagster uses the original ones.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from dagster._core.storage.event_log import ConsolidatedSqliteEventLogStorage
from dagster._core.storage.event_log.polling_event_watcher import SqlPollingEventWatcher
from dagster._core.storage.runs import SqliteRunStorage
from dagster._core.storage.schedules import SqliteScheduleStorage
from dagster._core.storage.sqlite import SQLITE_BUSY_TIMEOUT_SECONDS, create_db_conn_string
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClassData

from imagepipeline.instance.event_filter import EventFilter
from imagepipeline.stores.database import create_sqlite_engine, truncate_sqlite_log


class PooledSqliteStorage(DagsterSqliteStorage):
    """Stores runs, ticks and events in one database each in `base_dir`."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        os.umask(0o077)  # for Dagster's own tools, which do not load our settings
        self.base_dir = base_dir
        self._run_storage: Any = PooledRunStorage.from_local(base_dir)
        self._event_log_storage: Any = PooledEventLogStorage(base_dir)
        self._schedule_storage: Any = PooledScheduleStorage.from_local(base_dir)
        self._inst_data = inst_data
        super(DagsterSqliteStorage, self).__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Any) -> Self:
        """Returns the storage that `dagster.yaml` configures."""
        return cls.from_local(inst_data=inst_data, **config_value)


class PooledConnections:
    """A mixin that makes all queries of a storage share one engine per process."""

    _conn_string: str

    @contextmanager
    def connect(self) -> Iterator[sa.Connection]:
        """Yields a connection in a transaction."""
        with _get_engine(self._conn_string).begin() as connection:
            yield connection


class PooledRunStorage(PooledConnections, SqliteRunStorage):
    """Stores Dagster's runs."""

    @classmethod
    def from_local(cls, base_dir: str, inst_data: ConfigurableClassData | None = None) -> Self:
        """Returns the storage, and creates its database if there is none."""
        if Path(base_dir, "runs.db").exists():  # skips Alembic's check, which takes 60 ms
            return cls(create_db_conn_string(base_dir, "runs"), inst_data)
        return super().from_local(base_dir, inst_data)


class PooledScheduleStorage(PooledConnections, SqliteScheduleStorage):
    """Stores the state of Dagster's sensors and their ticks."""

    @classmethod
    def from_local(
        cls, base_dir: str, inst_data: ConfigurableClassData | None = None
    ) -> SqliteScheduleStorage:
        """Returns the storage, and creates its database if there is none."""
        if Path(base_dir, "schedules.db").exists():
            return cls(create_db_conn_string(base_dir, "schedules"), inst_data)
        return super().from_local(base_dir, inst_data)


class PooledEventLogStorage(PooledConnections, EventFilter, ConsolidatedSqliteEventLogStorage):
    """Stores Dagster's events that somebody reads; watchers poll for them.

    The original storage watches the file for changes, but with connections kept open, the file
    rarely changes.
    """

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(base_dir, inst_data)
        self._watcher = SqlPollingEventWatcher(self)

    def _connect(self) -> Any:
        return self.connect()

    def has_table(self, table_name: str) -> bool:
        """Returns whether a table exists.

        The answer is cached: Dagster asks about twenty times per run, and all tables are created at
        once.
        """
        return _has_table(self._conn_string, table_name)

    def watch(self, run_id: str, cursor: str | None, callback: Any) -> None:
        """Calls `callback` for each new event of the run."""
        self._watcher.watch_run(run_id, cursor, callback)

    def end_watch(self, run_id: str, handler: Any) -> None:
        """Stops calling `handler` for events of the run."""
        self._watcher.unwatch_run(run_id, handler)

    def dispose(self) -> None:
        """Stops all watchers."""
        self._watcher.close()


def close_connections() -> None:
    """Closes the connections of all storages of this process; later queries open new ones."""
    for engine in _engines:
        engine.dispose()


def truncate_logs() -> bool:
    """Empties the write-ahead logs of this process's storages; False if a reader prevents it."""
    return all(list(map(truncate_sqlite_log, _engines)))


_engines: list[sa.Engine] = []


@functools.cache
def _get_engine(url: str) -> sa.Engine:
    engine = create_sqlite_engine(url, connect_args={"timeout": SQLITE_BUSY_TIMEOUT_SECONDS})
    sa.event.listen(engine, "connect", _prepare_connection)
    _engines.append(engine)
    return engine


@functools.cache
def _has_table(url: str, name: str) -> bool:
    return sa.inspect(_get_engine(url)).has_table(name)


def _prepare_connection(connection: Any, _: Any) -> None:
    # No fsync per event: a power cut may lose the latest events but cannot damage the database, and
    # the reconciler repairs any disagreement between the catalogue and Dagster.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA secure_delete = ON")  # an erased image leaves no bytes
