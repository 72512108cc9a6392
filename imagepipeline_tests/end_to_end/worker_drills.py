"""Breaks workers, their children and Redis while images are processed, and measures the delay.

    python -m imagepipeline_tests.end_to_end.worker_drills      # all, on SQLite: about 25 minutes
    python -m imagepipeline_tests.end_to_end.worker_drills --postgres killed_child lost_task

Each drill pushes images, breaks something, and checks that no image is lost, processed twice or
paid twice, and that no healthy run is failed. It prints the seconds from the end of the fault until
all images have ended.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from imagepipeline_tests.conftest import dagster_database, postgres_database, postgres_server
from imagepipeline_tests.end_to_end.drill import Drill, drill
from imagepipeline_tests.end_to_end.processes import list_tree

LIMIT_SECONDS = 90
FROZEN_SECONDS = 100
FULL_SECONDS = 20
NO_WORKER_SECONDS = 300
MAX_RUN_SECONDS = 30
SHORT_RUNS = {"IMAGEPIPELINE_MAX_RUN_SECONDS": str(MAX_RUN_SECONDS)}
REPORT_SECONDS = 90  # the queue is reported every minute


def cancelled_in_the_queue(stack: Drill) -> float:
    """Cancels a run that Dagster has not launched."""
    return _cancel_of(12, stack, "QUEUED")


def cancelled_while_it_waits_for_a_worker(stack: Drill) -> float:
    """Cancels a run whose task is on the list, because all slots are taken."""
    stack.push(8)
    stack.wait_until_working(3)
    with closing(stack.redis()) as client:
        stack.wait_for(lambda: client.llen(f"{stack.settings.queue_prefix}:runs:dagster"))
    return _cancel(stack, "STARTING", is_forced=True)  # the UI's only way in this state


def cancelled_while_it_starts(stack: Drill) -> float:
    """Cancels a run that a child has received but not begun."""
    children = stack.children()
    stack.tell(signal.SIGSTOP, *children)
    [image_id] = stack.push(1)
    run_id = stack.run_of(image_id, "STARTING")
    stack.cancel(run_id, is_forced=True)
    stack.tell(signal.SIGCONT, *children)
    return _wait_for_the_cancelled(stack, run_id, time.monotonic())


def cancelled_while_it_works(stack: Drill) -> float:
    """Cancels a run that waits for the provider."""
    return _cancel_of(3, stack, "STARTED")


def cancelled_by_force(stack: Drill) -> float:
    """Cancels a working run by force, which marks it as cancelled at once."""
    return _cancel_of(3, stack, "STARTED", is_forced=True)


def _cancel_of(images: int, stack: Drill, status: str, is_forced: bool = False) -> float:
    """Pushes images, and cancels one of their runs once three are working."""
    stack.push(images)
    stack.wait_until_working(3)
    return _cancel(stack, status, is_forced)


def _cancel(stack: Drill, status: str, is_forced: bool = False) -> float:
    run_id = stack.wait_for(
        lambda: next((run["id"] for run in stack.runs() if run["status"] == status), None)
    )
    stack.cancel(run_id, is_forced)
    return _wait_for_the_cancelled(stack, run_id, time.monotonic())


def _wait_for_the_cancelled(stack: Drill, run_id: str, began: float) -> float:
    stack.cancelled += 1
    [image_id] = [run["image"] for run in stack.runs() if run["id"] == run_id]
    stack.wait_for(lambda: stack.catalogue.get(image_id)["status"] == "failed")
    seconds = time.monotonic() - began
    assert stack.catalogue.get(image_id)["reason"] == "cancelled"
    stack.wait_for(lambda: stack.run_of(image_id, "CANCELED"))
    stack.measure_completion(began)
    return seconds


def killed_child(stack: Drill) -> float:
    """Kills a child that executes a run."""
    stack.push(6)
    stack.wait_until_working()
    stack.tell(signal.SIGKILL, stack.busy_children()[0])
    return stack.measure_completion(time.monotonic())


def killed_worker(stack: Drill) -> float:
    """Kills the worker, with which all its children and their runs end."""
    stack.push(6)
    stack.wait_until_working(3)
    stack.tell(signal.SIGKILL, stack.worker)
    return stack.measure_completion(time.monotonic())


def killed_worker_and_code_server(stack: Drill) -> float:
    """Kills the worker, and the process that evaluates the sensors, at once."""
    stack.push(6)
    stack.wait_until_working(3)
    stack.tell(signal.SIGKILL, stack.worker, stack.find("code-server"))
    return stack.measure_completion(time.monotonic())


def killed_redis(stack: Drill) -> float:
    """Kills the local Valkey, which the supervisor restarts."""
    stack.push(8)
    stack.wait_until_working()
    stack.tell(signal.SIGKILL, stack.find("redis"))
    return stack.measure_completion(time.monotonic())


def restarted_redis(stack: Drill) -> float:
    """Shuts the local Valkey down like an administrator; the supervisor restarts it."""
    stack.push(8)
    stack.wait_until_working()
    stack.tell(signal.SIGTERM, stack.find("redis"))
    return stack.measure_completion(time.monotonic())


def frozen_redis(stack: Drill) -> float:
    """Freezes the local Valkey for 20 s: it accepts connections but does not answer."""
    stack.push(8)
    stack.wait_until_working()
    redis = stack.find("redis")
    stack.tell(signal.SIGSTOP, redis)
    time.sleep(FULL_SECONDS)
    stack.tell(signal.SIGCONT, redis)
    return stack.measure_completion(time.monotonic())


def frozen_child(stack: Drill) -> float:
    """Freezes a child that executes a run, for good."""
    stack.push(6)
    stack.wait_until_working()
    frozen = stack.busy_children()[0]
    stack.tell(signal.SIGSTOP, frozen)
    seconds = stack.measure_completion(time.monotonic())
    stack.wait_for(lambda: not Path(f"/proc/{frozen}").exists())
    return seconds


def hanging_run(stack: Drill) -> float:
    """Holds back an answer of the provider for longer than a run may take; needs `SHORT_RUNS`."""
    answers_after = stack.provider.call_seconds
    stack.provider.call_seconds = MAX_RUN_SECONDS + 20
    [image_id] = stack.push(1)
    hanging = stack.run_of(image_id, "STARTED")
    began = time.monotonic()
    stack.wait_for(
        lambda: "recovered" in [line["event"] for line in stack.catalogue.get(image_id)["history"]]
    )
    stack.provider.call_seconds = answers_after
    assert stack.run_of(image_id, "FAILURE") == hanging
    seconds = stack.measure_completion(began)
    [end] = [run["end"] for run in stack.runs() if run["id"] == hanging]
    # Celery kills it 0.1 s after it has told it to stop.
    assert re.search(r"The process that executed the run died|Steps failed: \['metadata'\]", end), (
        end
    )
    return seconds


def frozen_worker(stack: Drill) -> float:
    """Freezes the worker and all its processes for 100 s."""
    stack.push(6)
    stack.wait_until_working(3)
    frozen = list_tree(stack.worker)
    stack.tell(signal.SIGSTOP, *frozen)
    time.sleep(FROZEN_SECONDS)
    for pid in frozen:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    return stack.measure_completion(time.monotonic())


def drained_worker(stack: Drill) -> float:
    """Terminates the worker: it finishes its runs, and the rest waits for the next worker."""
    stack.push(8)
    stack.wait_until_working(3)
    worker = stack.worker
    under_way = {row.image_id for row in stack.catalogue.list_processing()}
    stack.tell(signal.SIGTERM, worker)
    began = time.monotonic()
    stack.wait_for(lambda: not Path(f"/proc/{worker}").exists())
    for image_id in under_way:
        row = stack.catalogue.get(image_id)
        assert (row["status"], row["generation"]) == ("completed", 1), row["history"]
    seconds = stack.measure_completion(began)
    assert {run["status"] for run in stack.runs()} == {"SUCCESS"}
    return seconds


def full_redis(stack: Drill) -> float:
    """Fills Redis for 20 s, while runs are launched and a child is killed."""
    stack.push(12)
    stack.wait_until_working()
    worker = stack.worker
    with closing(stack.redis()) as client:
        client.config_set("maxmemory", 1)
        stack.tell(signal.SIGKILL, stack.busy_children()[0])
        time.sleep(FULL_SECONDS)
        assert stack.worker == worker, "the worker did not survive"
        client.config_set("maxmemory", 0)
    return stack.measure_completion(time.monotonic())


def lost_task(stack: Drill) -> float:
    """Deletes the list of waiting tasks."""
    stack.push(8)
    stack.wait_until_working(3)
    key = f"{stack.settings.queue_prefix}:runs:dagster"
    with closing(stack.redis()) as client:
        stack.wait_for(lambda: client.llen(key) >= 2)
        client.delete(key)
    return stack.measure_completion(time.monotonic())


def flushed_redis(stack: Drill) -> float:
    """Deletes all data in Redis, as a restart without persistence would."""
    stack.push(8)
    stack.wait_until_working(3)
    with closing(stack.redis()) as client:
        stack.wait_for(lambda: client.llen(f"{stack.settings.queue_prefix}:runs:dagster") >= 2)
        client.flushall()
    return stack.measure_completion(time.monotonic())


def no_worker(stack: Drill) -> float:
    """Runs no worker for five minutes; the runs wait, and begin in their first generation.

    The asset `queue` says so meanwhile.
    """
    stack.stop_service("worker")
    image_ids = stack.push(6)
    time.sleep(NO_WORKER_SECONDS)
    assert stack.count("pending") == 6
    shown = stack.read_newest("queue")
    assert shown["pending_count"] == 6, shown
    assert shown["oldest_seconds"] > NO_WORKER_SECONDS - REPORT_SECONDS, shown
    began = time.monotonic()
    stack.start_service("worker")
    seconds = stack.measure_completion(began)
    assert {stack.catalogue.get(image_id)["generation"] for image_id in image_ids} == {1}
    assert {run["status"] for run in stack.runs()} == {"SUCCESS"}
    return seconds


DRILLS: dict[str, Callable[[Drill], float]] = {
    one.__name__: one
    for one in (
        cancelled_in_the_queue,
        cancelled_while_it_waits_for_a_worker,
        cancelled_while_it_starts,
        cancelled_while_it_works,
        cancelled_by_force,
        killed_child,
        killed_worker,
        killed_worker_and_code_server,
        killed_redis,
        restarted_redis,
        frozen_redis,
        frozen_child,
        hanging_run,
        frozen_worker,
        drained_worker,
        full_redis,
        lost_task,
        flushed_redis,
        no_worker,
    )
}


@contextmanager
def databases(has_postgres: bool) -> Iterator[dict[str, str]]:
    """Yields the environment of a stack on SQLite, or on two new Postgres databases."""
    if not has_postgres:
        yield {}
        return
    with (
        postgres_server() as server_url,
        dagster_database(server_url) as template,
        postgres_database(server_url) as catalogue_url,
        postgres_database(server_url, template) as dagster_url,
    ):
        yield {"DATABASE_URL": catalogue_url, "DAGSTER_DATABASE_URL": dagster_url}


def perform(name: str, stack: Drill) -> float:
    """Performs a drill and checks the result; returns its seconds."""
    seconds = DRILLS[name](stack)
    stack.check()
    return seconds


def main() -> None:
    """Performs the named drills, or all; the exit code is 1 if one fails or takes too long."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="DRILL", help=", ".join(DRILLS))
    parser.add_argument("--postgres", action="store_true", help="on Postgres instead of SQLite")
    options = parser.parse_args()
    has_failed = False
    for name in options.names or DRILLS:
        # Fewer slots than the five runs, so two of them wait for a worker.
        slots = {"IMAGEPIPELINE_WORKER_SLOTS": "3"}
        if name == "hanging_run":
            slots |= SHORT_RUNS
        with (
            databases(options.postgres) as urls,
            drill(has_services=name == "no_worker", **slots, **urls) as stack,
        ):
            try:
                seconds = perform(name, stack)
            except Exception as error:
                has_failed = True
                print(f"{name:<40} {type(error).__name__}: {error}", flush=True)
                stack.show_logs()
                continue
        has_failed |= seconds > LIMIT_SECONDS
        print(f"{name:<40} {seconds:.0f} s", flush=True)
    sys.exit(int(has_failed))


if __name__ == "__main__":
    main()
