"""Dagster's daemon, awake: it starts ticks twice a second and looks for queued runs seven times.

    python -m imagepipeline.runtime.daemon run -w workspace.yaml

Takes the arguments of `dagster-daemon`. As shipped, the daemon starts ticks every 5 s, which no setting changes, and
launches queued runs every 1 to 1.5 s (docs/decisions/0008-warm-processes.md). Where Dagster is not built as it was
when this was written, it says so and runs as shipped.
"""

import sys
import time
from typing import Any

import sqlalchemy as sa
from dagster._daemon import controller, sensor
from dagster._daemon.cli import main as run_daemon
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon

from imagepipeline.settings import Settings

TICK_PAUSE_SECONDS, QUEUE_PAUSE_SECONDS = 0.5, 0.15  # 3 % of a core while nothing happens
SHIPPED_TICK_SECONDS = 5


class PromptQueue(QueuedRunCoordinatorDaemon):
    """The part that launches queued runs; its shipped loop waits in steps of half a second."""

    def __init__(self, interval_seconds: float) -> None:
        super().__init__(interval_seconds=0)

    def run_iteration(self, *args: Any, **kwargs: Any) -> Any:
        """One look at the queue, after a pause."""
        time.sleep(QUEUE_PAUSE_SECONDS)
        yield from super().run_iteration(*args, **kwargs)


def main() -> None:
    """Runs until it is stopped."""
    is_known = getattr(sensor, "MIN_INTERVAL_LOOP_TIME", None) == SHIPPED_TICK_SECONDS
    if (
        is_known
        and getattr(controller, "QueuedRunCoordinatorDaemon", None) is QueuedRunCoordinatorDaemon
    ):
        vars(sensor)["MIN_INTERVAL_LOOP_TIME"] = TICK_PAUSE_SECONDS
        vars(controller)["QueuedRunCoordinatorDaemon"] = PromptQueue
    else:
        print(
            "Uploads start up to 6 s late: this version of Dagster's daemon is not known here.",
            file=sys.stderr,
        )
    lock = acquire_lock(Settings.load())
    run_daemon()
    del lock


def acquire_lock(settings: Settings) -> Any:
    """A connection that holds Postgres's lock for the one daemon as long as it lives; None on SQLite.

    With two daemons, Dagster would only write into the log that there are two, and both would start runs.

    Raises:
        SystemExit: another daemon holds it.
    """
    if settings.dagster_database_url is None:  # the supervisor has a lock of its own
        return None
    engine = sa.create_engine(
        settings.dagster_database_url.get_secret_value(), isolation_level="AUTOCOMMIT"
    )
    connection = engine.connect()
    if not connection.exec_driver_sql(
        "SELECT pg_try_advisory_lock(hashtext('imagepipeline daemon'))"
    ).scalar_one():
        sys.exit(
            "Another daemon works for this database, and there must be one only: stop that one first."
        )
    return connection


if __name__ == "__main__":
    main()
