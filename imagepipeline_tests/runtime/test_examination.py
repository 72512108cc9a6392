"""The examination of a running stack covers all sensors."""

from imagepipeline.definitions import defs
from imagepipeline.runtime.examination import SENSORS


def test_all_sensors_are_examined():
    assert sorted(SENSORS) == sorted(sensor.name for sensor in defs().sensors)
