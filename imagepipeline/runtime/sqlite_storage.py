"""Dagster's own SQLite storages, with connections that stay open and all events in one database.

As shipped, Dagster makes an engine per query, which compiles every statement anew, and a database per run, which is
created and stamped by Alembic: most of a run's CPU time (docs/decisions/0008-warm-processes.md). `imagepipeline up`
names it in its `dagster.yaml`; without that entry Dagster uses its own. Tables and statements are Dagster's.
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

from imagepipeline.stores.database import create_sqlite_engine


class PooledSqliteStorage(DagsterSqliteStorage):
    """Runs, ticks and events, in a database each below `base_dir`."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        os.umask(0o077)  # Dagster's own tools come in here, and load no settings of ours
        self.base_dir = base_dir
        self._run_storage: Any = PooledRunStorage.from_local(base_dir)
        self._event_log_storage: Any = PooledEventLogStorage(base_dir)
        self._schedule_storage: Any = PooledScheduleStorage.from_local(base_dir)
        self._inst_data = inst_data
        super(DagsterSqliteStorage, self).__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Any) -> Self:
        """The storage in the folder that `dagster.yaml` names."""
        return cls.from_local(inst_data=inst_data, **config_value)


class PooledConnections:
    """A storage whose queries share the connections of one engine per process."""

    _conn_string: str

    @contextmanager
    def connect(self) -> Iterator[sa.Connection]:
        """A connection in a transaction."""
        with _get_engine(self._conn_string).begin() as connection:
            yield connection


class PooledRunStorage(PooledConnections, SqliteRunStorage):
    """Dagster's runs."""

    @classmethod
    def from_local(cls, base_dir: str, inst_data: ConfigurableClassData | None = None) -> Self:
        """The storage; where there is none, it is created."""
        if Path(base_dir, "runs.db").exists():  # Dagster would have Alembic look into it: 60 ms
            return cls(create_db_conn_string(base_dir, "runs"), inst_data)
        return super().from_local(base_dir, inst_data)


class PooledScheduleStorage(PooledConnections, SqliteScheduleStorage):
    """Dagster's sensors and their ticks."""

    @classmethod
    def from_local(
        cls, base_dir: str, inst_data: ConfigurableClassData | None = None
    ) -> SqliteScheduleStorage:
        """The storage; where there is none, it is created."""
        if Path(base_dir, "schedules.db").exists():
            return cls(create_db_conn_string(base_dir, "schedules"), inst_data)
        return super().from_local(base_dir, inst_data)


class PooledEventLogStorage(PooledConnections, ConsolidatedSqliteEventLogStorage):
    """Dagster's events, followed as in Postgres by asking: the file changes rarely while it is kept open."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(base_dir, inst_data)
        self._watcher = SqlPollingEventWatcher(self)

    def _connect(self) -> Any:
        return self.connect()

    def has_table(self, table_name: str) -> bool:
        """Whether the table is there; asked some twenty times a run, and all are made at once."""
        return _has_table(self._conn_string, table_name)

    def watch(self, run_id: str, cursor: str | None, callback: Any) -> None:
        """Calls `callback` with each new event of the run."""
        self._watcher.watch_run(run_id, cursor, callback)

    def end_watch(self, run_id: str, handler: Any) -> None:
        """Ends that."""
        self._watcher.unwatch_run(run_id, handler)

    def dispose(self) -> None:
        """Ends all watching."""
        self._watcher.close()


def close_connections() -> None:
    """Closes those of all storages of this process; a later query opens new ones."""
    for engine in _engines:
        engine.dispose()


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
    # No fsync per event: a power cut may lose the last events, never the database, and the reconciler sets right
    # what the catalogue and Dagster then disagree on.
    connection.execute("PRAGMA synchronous = NORMAL")
