"""What Dagster's database is asked about."""

from imagepipeline.definitions import defs
from imagepipeline.runtime.examination import SENSORS


def test_the_sensors_that_are_looked_at_are_those_there_are():
    assert sorted(SENSORS) == sorted(sensor.name for sensor in defs().sensors)
