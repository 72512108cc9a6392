"""What Dagster is asked about its daemon and our sensors."""

import time
import uuid

import dagster as dg
import pytest
from dagster._core.remote_origin import (
    RegisteredCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus, InstigatorType, TickData, TickStatus
from dagster._daemon.types import DaemonHeartbeat

from imagepipeline.definitions import defs
from imagepipeline.runtime import services
from imagepipeline.runtime.health import SENSORS, find_ill_sensors, find_silent
from imagepipeline.settings import Settings


@pytest.fixture
def instance(tmp_path):
    services.prepare(Settings.load({"IMAGEPIPELINE_HOME": str(tmp_path)}))
    with dg.DagsterInstance.from_config(str(tmp_path / "dagster")) as instance:
        yield instance


@pytest.fixture
def record(instance):
    """Records a sensor's state, and ticks of these kinds, as the daemon does."""

    def record(name, status, *ticks):
        repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("imagepipeline"), "__repository__")
        origin = RemoteInstigatorOrigin(repository, name)
        selector_id = f"selector-{name}"
        instance.add_instigator_state(InstigatorState(origin, InstigatorType.SENSOR, status, None))
        for kind in ticks:
            instance.create_tick(
                TickData(origin.get_id(), name, InstigatorType.SENSOR, kind, time.time(), selector_id=selector_id)
            )
        return origin

    return record


def test_the_sensors_that_are_looked_for_are_those_there_are():
    assert {sensor.name for sensor in defs().sensors} == set(SENSORS)


def test_a_daemon_without_a_recent_sign_of_life_is_silent(instance):
    types = sorted(instance.get_required_daemon_types())
    assert find_silent(instance) == types
    for kind in types:
        at = time.time() - (1000 if kind == "SENSOR" else 0)
        instance.add_daemon_heartbeat(DaemonHeartbeat(at, kind, str(uuid.uuid4()), []))
    assert find_silent(instance) == ["SENSOR"]


def test_sensors_that_never_ran_or_were_stopped_are_named(instance, record):
    assert len(find_ill_sensors(instance)) == 3
    record("upload_sensor", InstigatorStatus.DECLARED_IN_CODE, TickStatus.SKIPPED)
    record("reconciler", InstigatorStatus.STOPPED)
    record("notification_sensor", InstigatorStatus.RUNNING)
    assert find_ill_sensors(instance) == ["reconciler was stopped in the UI"]
