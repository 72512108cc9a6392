"""Dagster's daemon, awake: it starts ticks twice a second and looks for queued runs seven times.

    python -m imagepipeline.runtime.daemon run -w workspace.yaml

Takes the arguments of `dagster-daemon`. As shipped, the daemon starts ticks every 5 s, which no setting changes, and
launches queued runs every 1 to 1.5 s (docs/decisions/0008-warm-processes.md). Where Dagster is not built as it was
when this was written, it says so and runs as shipped.
"""

import sys
import time
from typing import Any

from dagster._daemon import controller, sensor
from dagster._daemon.cli import main as run_daemon
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon

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
    if is_known and getattr(controller, "QueuedRunCoordinatorDaemon", None) is QueuedRunCoordinatorDaemon:
        vars(sensor)["MIN_INTERVAL_LOOP_TIME"] = TICK_PAUSE_SECONDS
        vars(controller)["QueuedRunCoordinatorDaemon"] = PromptQueue
    else:
        print("Uploads start up to 6 s late: this version of Dagster's daemon is not known here.", file=sys.stderr)
    run_daemon()


if __name__ == "__main__":
    main()
