"""Runs the short drills on SQLite; `worker_drills` has more, and runs on both databases."""

import pytest

from imagepipeline_tests.end_to_end import bounds
from imagepipeline_tests.end_to_end.drill import drill
from imagepipeline_tests.end_to_end.worker_drills import (
    LIMIT_SECONDS,
    SHORT_RUNS,
    databases,
    perform,
)

pytestmark = pytest.mark.drills


def test_faults_cause_no_image_to_be_lost_processed_twice_or_paid_twice():
    with (
        databases(False) as urls,
        drill(IMAGEPIPELINE_WORKER_SLOTS="3", **urls) as stack,
    ):
        for name in (
            "cancelled_while_it_works",
            "cancelled_by_force",
            "killed_child",
            "frozen_child",
            "killed_worker_and_code_server",
            "killed_redis",
        ):
            seconds = perform(name, stack)
            print(f"{name}: {seconds:.0f} s")
            assert seconds <= LIMIT_SECONDS


def test_connections_and_keys_do_not_grow_and_a_run_that_hangs_is_replaced():
    slots = {"IMAGEPIPELINE_WORKER_SLOTS": "2", "IMAGEPIPELINE_MAX_RUNS": "2"} | SHORT_RUNS
    with databases(True) as urls, drill(call_seconds=0.05, **slots, **urls) as stack:
        bounds.check(bounds.process(stack, images=16), *bounds.kill_worker(stack))
        assert perform("hanging_run", stack) <= LIMIT_SECONDS
