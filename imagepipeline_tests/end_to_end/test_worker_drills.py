"""The drills that are short, on SQLite; see `worker_drills` for all of them on both databases, and `bounds`."""

import pytest

from imagepipeline_tests.end_to_end import bounds
from imagepipeline_tests.end_to_end.drill import drill
from imagepipeline_tests.end_to_end.worker_drills import LIMIT_SECONDS, databases, perform

pytestmark = [pytest.mark.drills, pytest.mark.xdist_group("drills")]


def test_whatever_breaks_nothing_is_lost_done_twice_or_paid_twice():
    with (
        databases(False) as urls,
        drill(IMAGEPIPELINE_WORKER_SLOTS="3", **urls) as stack,
    ):
        for name in (
            "cancelled_while_it_works",
            "cancelled_by_force",
            "killed_child",
            "killed_redis",
        ):
            seconds = perform(name, stack)
            print(f"{name}: {seconds:.0f} s")
            assert seconds <= LIMIT_SECONDS


def test_connections_and_keys_do_not_grow_with_the_runs():
    slots = {"IMAGEPIPELINE_WORKER_SLOTS": "2", "IMAGEPIPELINE_MAX_RUNS": "2"}
    with databases(True) as urls, drill(call_seconds=0.05, **slots, **urls) as stack:
        bounds.check(*bounds.measure(stack, images=16))
