"""Kills the sensor tick at every step, and counts uploads lost or duplicated after later ticks.

    python -m imagepipeline_tests.end_to_end.tick_crashes --repeat 10

This runs 540 trials and writes docs/kill-matrix.md. Each trial is a process that runs Dagster's
real sensor iteration on SQLite, or with `--postgres` on Postgres, with a real Redis-compatible
server. A signal ends it at one of Dagster's own six crash points or one of our three.
"""

import argparse
import functools
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import dagster as dg
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.test_utils import InProcessTestWorkspaceLoadTarget, freeze_time
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._daemon.sensor import execute_sensor_iteration
from dagster._utils.interrupts import setup_interrupt_handlers

import imagepipeline.definitions  # noqa: F401  (before the fork, to import it only once)
from imagepipeline.defs import events, sensors
from imagepipeline.defs.sensors import DEFAULT_SLOTS, RUNS_PER_SLOT
from imagepipeline.runtime import services
from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline_tests.conftest import (
    catalogue_database,
    dagster_database,
    postgres_database,
    postgres_server,
    redis_server,
)

DAGSTER_POINTS = (
    "TICK_CREATED",
    "TICK_HELD",
    "AUTOMATION_EVALUATIONS_ADDED",
    "RUN_IDS_RESERVED",
    "RUN_CREATED",
    "RUN_LAUNCHED",
)
OUR_POINTS = ("after LRANGE", "after commit", "before LREM")
POINTS = DAGSTER_POINTS + OUR_POINTS
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
BATCHES = (1, 5, 50)
BAD_ENTRY = b"../etc/passwd"


Databases = Callable[[Path], AbstractContextManager[dict[str, str]]]
ON_SQLITE = {"DATABASE_URL": "", "DAGSTER_DATABASE_URL": ""}


@contextmanager
def on_sqlite(template: Path, home: Path) -> Iterator[dict[str, str]]:
    """Copies empty databases into a home; yields the environment of its trial."""
    shutil.copytree(template, home, dirs_exist_ok=True)
    yield ON_SQLITE


@contextmanager
def on_postgres(server_url: str, templates: tuple[str, str], _: Path) -> Iterator[dict[str, str]]:
    """Yields the environment of a trial on two new databases, with empty tables."""
    with (
        postgres_database(server_url, templates[0]) as catalogue_url,
        postgres_database(server_url, templates[1]) as dagster_url,
    ):
        yield {"DATABASE_URL": catalogue_url, "DAGSTER_DATABASE_URL": dagster_url}


@contextmanager
def choose_databases(has_postgres: bool) -> Iterator[Databases]:
    """Yields the function that creates the databases of a trial, with empty tables."""
    if not has_postgres:
        with tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as folder:
            settings = _prepare_home(Path(folder), ON_SQLITE)
            with closing(Catalogue(settings.database_url)) as catalogue:
                catalogue.migrate()
            _in_child(_list_partitions_of_runs)  # creates Dagster's databases
            yield functools.partial(on_sqlite, Path(folder))
        return
    with (
        postgres_server() as server_url,
        catalogue_database(server_url) as of_catalogue,
        dagster_database(server_url) as of_dagster,
    ):
        yield functools.partial(on_postgres, server_url, (of_catalogue, of_dagster))


def run_trial(
    redis_url: str, databases: Databases, point: str, signal_number: int, batch: int
) -> dict[str, Any]:
    """Pushes a batch, kills the tick that takes it in, runs two more ticks, and checks the result.

    Returns:
        `was_killed`, `lost` and `double` (numbers of IDs), and `left` (entries still on a list).
    """
    with (
        tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as folder,
        databases(Path(folder)) as urls,
    ):
        prefix = Path(folder).name
        further = {"REDIS_URL": redis_url, "IMAGEPIPELINE_QUEUE_PREFIX": prefix}
        settings = _prepare_home(Path(folder), urls | further)
        catalogue = Catalogue(settings.database_url)
        queue = UploadQueue(redis_url, prefix)
        image_ids = [f"image{number}" for number in range(batch)]
        for image_id in image_ids:
            queue.enqueue(image_id)
        if batch > 1:  # add a duplicate and an unreadable entry
            queue.enqueue(image_ids[0])
            queue.redis.lpush(queue.wait_key, BAD_ENTRY)
        began = datetime.now(UTC)
        status = _in_child(lambda: _tick(began, point, signal_number))
        _in_child(lambda: [_tick(began + timedelta(seconds=60 * n)) for n in (1, 2)])
        runs = _in_child_json(_list_partitions_of_runs)
        counts = Counter(runs)
        states = catalogue.get_states(image_ids)
        # Images beyond the limit on requested runs wait in the catalogue.
        has_room = len(counts) < min(batch, RUNS_PER_SLOT * DEFAULT_SLOTS)
        lost = [
            image_id
            for image_id in image_ids
            if image_id not in states or (counts[image_id] == 0 and has_room)
        ]
        left = queue.count()["waiting"]
        dead = queue.count()["dead"]
        queue.redis.delete(queue.wait_key, queue.active_key, queue.dead_key)
        catalogue.close()
        return {
            "was_killed": os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) != 0,
            "lost": len(lost),
            "double": sum(count > 1 for count in counts.values())
            + sum(state.generation != 1 for state in states.values()),
            "left": left + (dead != (batch > 1)),
        }


def _prepare_home(home: Path, urls: Mapping[str, str]) -> Settings:
    """Makes this process and its children use a home."""
    os.environ.update(urls, IMAGEPIPELINE_HOME=str(home))
    services.prepare(settings := Settings.load())
    os.environ.update(services.build_environment(settings, "code-server"))
    return settings


def _tick(at: datetime, point: str | None = None, signal_number: int = 0) -> None:
    """Runs one iteration of the sensor daemon at the given time; dies at `point`."""
    flags: dict[str, dict[str, int]] = {}
    if point in DAGSTER_POINTS:
        flags = {"upload_sensor": {point: signal_number}}
    elif point is not None:
        _die_at(point, signal_number)
    origin = LoadableTargetOrigin(
        executable_path=sys.executable, module_name="imagepipeline.definitions"
    )
    target = InProcessTestWorkspaceLoadTarget(
        InProcessCodeLocationOrigin(origin, location_name="imagepipeline")
    )
    with (
        dg.DagsterInstance.get() as instance,
        WorkspaceProcessContext(instance, target) as workspace,
        freeze_time(at),
        # Sensors wait for uploads and events that may come; here none do.
        mock.patch.object(sensors, "MAX_WAIT_SECONDS", 0.01),
        mock.patch.object(events, "TICK_SECONDS", 0),
    ):
        list(execute_sensor_iteration(workspace, _logger(), None, None, debug_crash_flags=flags))


def _die_at(point: str, signal_number: int) -> None:
    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal_number)
        time.sleep(1)  # the handler of a signal may raise here

    if point == "after LRANGE":
        _wrap(UploadQueue, "read", after=die)
    elif point == "after commit":
        _wrap(Catalogue, "accept", after=die)
    else:
        _wrap(UploadQueue, "acknowledge", before=die)


def _wrap(
    owner: type,
    name: str,
    before: Callable[..., None] | None = None,
    after: Callable[..., None] | None = None,
) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if before:
            before()
        result = original(*arguments, **options)
        if after:
            after()
        return result

    setattr(owner, name, wrapped)


def _list_partitions_of_runs() -> list[str]:
    with dg.DagsterInstance.get() as instance:
        return [run.tags["dagster/partition"] for run in instance.get_runs()]


def _logger() -> Any:
    import logging

    logger = logging.getLogger("tick")
    logger.setLevel(logging.CRITICAL)
    return logger


def _in_child(action: Callable[[], object]) -> int:
    """Runs an action in a forked process; returns its status from `os.waitpid`."""
    assert threading.active_count() == 1, "fork before threads"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(devnull, 2)
            # As in the daemon. If a shell starts us with `&`, we inherit an ignored SIGINT, which
            # Dagster's handlers would keep.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            setup_interrupt_handlers()
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def _in_child_json(action: Callable[[], Any]) -> Any:
    read, write = os.pipe()
    _in_child(lambda: os.write(write, json.dumps(action()).encode()))
    os.close(write)
    with os.fdopen(read) as answer:
        return json.loads(answer.read())


def main() -> None:
    """Runs the matrix and writes it; the exit code is 1 if anything was lost, doubled or left."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument(
        "--signals", nargs="*", default=[one.name for one in SIGNALS], help="by default both"
    )
    parser.add_argument("--postgres", action="store_true", help="on Postgres instead of SQLite")
    parser.add_argument(
        "--json", action="store_true", help="print the totals as JSON and write no file"
    )
    options = parser.parse_args()
    table: dict[tuple[str, str], Counter[str]] = {}
    began = time.monotonic()
    with redis_server() as redis_url, choose_databases(options.postgres) as databases:
        for point, number, batch, _ in itertools.product(
            POINTS,
            [signal.Signals[name] for name in options.signals],
            options.batches,
            range(options.repeat),
        ):
            result = run_trial(redis_url, databases, point, number, batch)
            cell = table.setdefault((point, number.name), Counter())
            cell.update({"trials": 1, **{name: int(value) for name, value in result.items()}})
            print(
                f"{point:<30} {number.name:<8} batch {batch:<3} {result}",
                file=sys.stderr,
                flush=True,
            )
    total = sum(table.values(), Counter())
    seconds = time.monotonic() - began
    if options.json:
        names = ("trials", "was_killed", "lost", "double", "left")
        print(json.dumps({"seconds": round(seconds), **{name: total[name] for name in names}}))
    else:
        database = "Postgres" if options.postgres else "SQLite"
        Path("docs/kill-matrix.md").write_text(_format(table, total, seconds, database))
    sys.exit(
        int(
            bool(
                total["lost"]
                or total["double"]
                or total["left"]
                or total["was_killed"] < total["trials"]
            )
        )
    )


def _format(
    table: dict[tuple[str, str], Counter[str]], total: Counter[str], seconds: float, database: str
) -> str:
    lines = [
        "# The kill matrix",
        "",
        f"For anyone who doubts that uploads survive a crash: the sensor tick on {database},",
        f"killed at every step, {total['trials']} trials in {seconds / 60:.0f} minutes. Written by",
        "`python -m imagepipeline_tests.end_to_end.tick_crashes --repeat 10`.",
        "",
        "Workers, their children, Redis and machines that break, with the seconds until all images",
        "are complete, are in [decision 13](decisions/0013-celery-workers.md).",
        "",
        f"Each trial pushes a batch of {', '.join(map(str, BATCHES))} entries (the larger ones",
        "contain an ID twice and an entry that cannot be read), kills the tick, and runs two more",
        "ticks. It then counts the IDs without a row or a run (lost), the IDs with two runs or a",
        "second generation (double), and the entries still on a list (left). Of 50 IDs, fifteen",
        "get their run at once; the others must have their row and wait in the catalogue.",
        "",
        "| killed at | by | trials | killed | lost | double | left |",
        "|---|---|---|---|---|---|---|",
    ]
    for (point, name), cell in table.items():
        numbers = [cell[column] for column in ("trials", "was_killed", "lost", "double", "left")]
        lines.append(f"| {point} | {name} | " + " | ".join(map(str, numbers)) + " |")
    numbers = [total[column] for column in ("trials", "was_killed", "lost", "double", "left")]
    lines.append("| **all** | | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
