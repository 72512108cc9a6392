"""What Dagster says of its daemon and of our sensors: `python -m imagepipeline.runtime.health` prints it as JSON.

A process of its own, because whoever asks for it should not have to import Dagster.
"""

import json
import time

from dagster import DagsterInstance
from dagster._core.scheduler.instigation import InstigatorStatus, TickStatus

SENSORS = ("upload_sensor", "reconciler", "notification_sensor")
HEARTBEAT_SECONDS = 120  # as DAGSTER_DAEMON_HEARTBEAT_TOLERANCE, which the services are started with
TICKS = 3


def main() -> None:
    """Prints `daemon` and `sensors`, each with what is wrong, empty where all is well."""
    with DagsterInstance.get() as instance:
        print(json.dumps({"daemon": find_silent(instance), "sensors": find_ill_sensors(instance)}))


def find_silent(instance: DagsterInstance) -> list[str]:
    """The parts of the daemon that gave no sign of life of late."""
    heartbeats = instance.get_daemon_heartbeats()
    since = time.time() - HEARTBEAT_SECONDS
    return sorted(
        name
        for name in instance.get_required_daemon_types()
        if name not in heartbeats or heartbeats[name].timestamp < since
    )


def find_ill_sensors(instance: DagsterInstance) -> list[str]:
    """A sentence for each sensor that never ran, was stopped in the UI, or failed at its last ticks."""
    states = {state.instigator_name: state for state in instance.all_instigator_state()}
    problems = []
    for name in SENSORS:
        state = states.get(name)
        if state is None:
            problems.append(f"{name} has never run")
        elif state.status == InstigatorStatus.STOPPED:
            problems.append(f"{name} was stopped in the UI")
        else:
            ticks = instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=TICKS)
            ended = [tick for tick in ticks if tick.status != TickStatus.STARTED]
            if ended and all(tick.status == TickStatus.FAILURE for tick in ended):
                problems.append(f"{name} failed at its last {len(ended)} ticks")
    return problems


if __name__ == "__main__":
    main()
