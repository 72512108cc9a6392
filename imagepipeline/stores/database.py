"""Database: connections to SQLite or Postgres, and transactions."""

import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from imagepipeline.errors import CatalogueDownError

T = TypeVar("T")

# Less than the time after which a run counts as stalled.
OUTLAST_SECONDS, OUTLAST_INTERVAL_SECONDS = 30, 1.0
PATIENCE_MS = 600_000
MAX_JSON_CHARACTERS = 1_000_000  # the metadata of an image may have 20,000
POSTGRES_OPTIONS: dict[str, Any] = {
    "pool_pre_ping": True,
    # One stays open. The others are opened when two threads of a process ask at once, and closed
    # when they are given back: at rest, each slot has one. They are as many as the threads of a run
    # of many images: four at work, four heartbeats and the main thread. With fewer, heartbeats of
    # images in good hands would wait in line after the server has stood still.
    "pool_size": 1,
    "max_overflow": 8,
    "connect_args": {
        "connect_timeout": 10,
        # A run that is frozen in a transaction may lock a row that its successor needs.
        "options": "-c idle_in_transaction_session_timeout=15000 -c statement_timeout=30000",
    },
}


class Database:
    """The database at a SQLAlchemy URL, `sqlite:///…` or `postgresql://…`.

    It connects when first used.
    """

    def __init__(self, url: str) -> None:
        self.engine = _get_engine(url)
        # The dialect's own insert, which has ON CONFLICT.
        self.insert: Any = (
            postgresql.insert if self.engine.dialect.name == "postgresql" else sqlite.insert
        )

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """A transaction: committed at the end, rolled back on an error.

        Raises:
            CatalogueDownError: the database does not answer.
        """
        with self._begin(self.engine) as connection:
            yield connection

    def truncate_log(self) -> bool:
        """On SQLite, empties the write-ahead log, which holds what was deleted; else does nothing.

        Returns:
            False if a reader has prevented it for half a minute.
        """
        return self.engine.dialect.name != "sqlite" or truncate_sqlite_log(self.engine)

    @contextmanager
    def reading(self, is_patient: bool = False) -> Iterator[sa.Connection]:
        """A transaction that only reads: on SQLite, it neither waits for writers nor stops them.

        With `is_patient`, a statement may take minutes on Postgres: for commands that count all
        images.

        Raises:
            CatalogueDownError: the database does not answer.
        """
        with self._begin(self.engine.execution_options(is_reading=True)) as connection:
            if is_patient and self.engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SET LOCAL statement_timeout = {PATIENCE_MS}")
            yield connection

    @contextmanager
    def _begin(self, engine: sa.Engine) -> Iterator[sa.Connection]:
        try:
            with engine.begin() as connection:
                yield connection
        except sa.exc.DBAPIError as error:
            # psycopg2 raises its DatabaseError, too, if the server dies in a statement.
            is_lost = isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)
            if is_lost or error.connection_invalidated:
                raise _say_down(error.orig) from None
            raise
        except sa.exc.TimeoutError as error:  # others had all connections, and got no answer
            raise _say_down(error) from None


def _say_down(cause: BaseException | None) -> CatalogueDownError:
    return CatalogueDownError(f"the catalogue does not answer ({type(cause).__name__})")


def outlast(ask: Callable[[], T]) -> T:
    """Asks a database that may be restarting, again and again for half a minute.

    For what would do harm if it were left undone. The reply may be lost after a commit, so it must
    be safe to repeat.

    Raises:
        CatalogueDownError: it still does not answer.
    """
    deadline = time.monotonic() + OUTLAST_SECONDS
    while True:
        try:
            return ask()
        except CatalogueDownError:
            if time.monotonic() > deadline:
                raise
            time.sleep(OUTLAST_INTERVAL_SECONDS)


def truncate_sqlite_log(engine: sa.Engine) -> bool:
    """Empties the write-ahead log of a SQLite database; False if a reader prevents it."""
    with closing(engine.raw_connection()) as connection:
        is_busy, _, _ = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not is_busy


def read_json(text: str) -> Any:
    """The object in a JSON column, or None if it is malformed or too long."""
    try:
        value = json.loads(text) if len(text) <= MAX_JSON_CHARACTERS else None
    except (ValueError, TypeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@functools.cache
def _get_engine(url: str) -> sa.Engine:
    """This process's engine for a URL, which all users of the database share."""
    parsed = sa.make_url(url)
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg2")
    if not parsed.drivername.startswith("sqlite"):
        return sa.create_engine(
            parsed, hide_parameters=True, json_deserializer=read_json, **POSTGRES_OPTIONS
        )
    engine = create_sqlite_engine(parsed, hide_parameters=True)
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin)
    return engine


def create_sqlite_engine(url: str | sa.URL, **options: Any) -> sa.Engine:
    """An engine that shares compiled statements with all others of this process.

    So the next run in the process need not compile them again.
    """
    engine = sa.create_engine(url, execution_options={"compiled_cache": _compiled}, **options)
    engine.dialect = _get_sqlite_dialect()  # part of the cache's keys
    return engine


_compiled: sa.util.LRUCache[Any, Any] = sa.util.LRUCache(1000)


@functools.cache
def _get_sqlite_dialect() -> sa.Dialect:
    engine = sa.create_engine("sqlite://", json_deserializer=read_json)
    engine.connect().close()  # it asks the library for its version
    engine.dispose()
    return engine.dialect


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late
    connection.execute("PRAGMA busy_timeout = 30000")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # an erased image leaves no bytes


def _begin(connection: sa.Connection) -> None:
    # A transaction that reads before it writes needs the lock from the start: otherwise its write
    # fails if another transaction wrote in between.
    is_reading = connection.get_execution_options().get("is_reading")
    connection.exec_driver_sql("BEGIN" if is_reading else "BEGIN IMMEDIATE")
