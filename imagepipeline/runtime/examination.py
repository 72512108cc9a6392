"""Reports the state of the daemon and the sensors, as recorded in Dagster's database.

    python -m imagepipeline.runtime.examination

Prints one line of JSON: `{"daemon": {part: problem}, "sensors": {name: problem}}`. An empty string
means that all is well. This is a separate process so that its callers need not import Dagster.
"""

import json
import time

from dagster import DagsterInstance

from imagepipeline.runtime.services import HEARTBEAT_TOLERANCE_SECONDS

SENSORS = (
    *("upload_sensor", "reconciler", "notification_sensor", "check_sensor", "event_sensor"),
    *("queue_sensor", "index_sensor", "prune_sensor"),
)


def main() -> None:
    """Examines the Dagster instance in DAGSTER_HOME."""
    with DagsterInstance.get() as instance:
        print(
            json.dumps({"daemon": _examine_parts(instance), "sensors": _examine_sensors(instance)})
        )


def _examine_parts(instance: DagsterInstance) -> dict[str, str]:
    heartbeats = instance.get_daemon_heartbeats()
    problems = {}
    for part in sorted(instance.get_required_daemon_types()):
        heartbeat = heartbeats.get(part)
        age_seconds = time.time() - heartbeat.timestamp if heartbeat else None
        problems[part] = (
            "has never run"
            if age_seconds is None
            else f"has sent no heartbeat for {age_seconds:.0f} s"
            if age_seconds > HEARTBEAT_TOLERANCE_SECONDS
            else ""
        )
    return problems


def _examine_sensors(instance: DagsterInstance) -> dict[str, str]:
    states = {state.instigator_name: state for state in instance.all_instigator_state()}
    problems = {}
    for name in SENSORS:
        state = states.get(name)
        if state is None:
            problems[name] = "has never run"
        elif state.status.value == "STOPPED":
            problems[name] = "is stopped: start it in the UI under Automation"
        else:
            ticks = instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=2)
            ended = [tick.status.value for tick in ticks if tick.status.value != "STARTED"]
            problems[name] = (
                "fails: see the UI under Automation for the reason"
                if ended[:1] == ["FAILURE"]
                else ""
            )
    return problems


if __name__ == "__main__":
    main()
