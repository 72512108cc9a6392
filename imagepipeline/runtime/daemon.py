"""Dagster's daemon with shorter polling intervals.

    python -m imagepipeline.runtime.daemon run -w workspace.yaml

Takes the arguments of `dagster-daemon`. The original daemon starts ticks every 5 s, which no
setting changes, and launches queued runs every 1 to 1.5 s
(docs/decisions/0008-warm-processes.md). This one starts ticks every 0.5 s and launches queued
runs every 0.15 s. If Dagster's internals differ from those expected here, it prints a
warning and keeps the original intervals.
"""

import sys
import time
from typing import Any

import sqlalchemy as sa
from dagster._daemon import controller, sensor
from dagster._daemon.cli import main as run_daemon
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon

from imagepipeline.settings import Settings

TICK_PAUSE_SECONDS, QUEUE_PAUSE_SECONDS = 0.5, 0.15  # together 3 % of a core when idle
ORIGINAL_TICK_SECONDS = 5


class FastQueuedRunCoordinatorDaemon(QueuedRunCoordinatorDaemon):
    """Launches queued runs, without the original loop's pauses of half a second."""

    def __init__(self, interval_seconds: float) -> None:
        super().__init__(interval_seconds=0)

    def run_iteration(self, *args: Any, **kwargs: Any) -> Any:
        """Launches the queued runs once, after a short pause."""
        time.sleep(QUEUE_PAUSE_SECONDS)
        yield from super().run_iteration(*args, **kwargs)


def main() -> None:
    """Runs the daemon until it is stopped.

    Raises:
        SystemExit: Another daemon already works for this database.
    """
    is_known = getattr(sensor, "MIN_INTERVAL_LOOP_TIME", None) == ORIGINAL_TICK_SECONDS
    if (
        is_known
        and getattr(controller, "QueuedRunCoordinatorDaemon", None) is QueuedRunCoordinatorDaemon
    ):
        vars(sensor)["MIN_INTERVAL_LOOP_TIME"] = TICK_PAUSE_SECONDS
        vars(controller)["QueuedRunCoordinatorDaemon"] = FastQueuedRunCoordinatorDaemon
    else:
        print(
            "Uploads may start up to 6 s late: polling cannot be sped up in this Dagster version.",
            file=sys.stderr,
        )
    lock = acquire_lock(Settings.load())
    run_daemon()
    del lock


def acquire_lock(settings: Settings) -> Any:
    """Takes the daemon lock in Postgres and returns the connection that holds it; None on SQLite.

    The lock lasts as long as the connection. Without it, two daemons would both start runs, and
    Dagster would only log a warning.

    Raises:
        SystemExit: Another daemon holds the lock.
    """
    if settings.dagster_database_url is None:  # on SQLite, the supervisor's lock is enough
        return None
    engine = sa.create_engine(
        settings.dagster_database_url.get_secret_value(), isolation_level="AUTOCOMMIT"
    )
    connection = engine.connect()
    if not connection.exec_driver_sql(
        "SELECT pg_try_advisory_lock(hashtext('imagepipeline daemon'))"
    ).scalar_one():
        sys.exit(
            "Another daemon already uses this database, and only one may: stop the other one first."
        )
    return connection


if __name__ == "__main__":
    main()
