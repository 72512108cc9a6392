"""The worker: a Celery worker that executes Dagster runs in pre-forked, warmed-up children.

    python -m imagepipeline.runtime.worker

You can start any number of workers on any number of machines; each needs its own home. A worker
manages one resident process, which serves the index and the offline models, and one zygote, from
which decoders are forked.
"""

import functools
import gc
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import billiard
from celery import Celery, bootsteps, signals
from celery.worker import state
from celery.worker.control import inspect_command
from dagster import DagsterEventType, DagsterInstance, DagsterRunStatus
from dagster._cli.api import _execute_run_command_body  # what `dagster api execute_run` calls
from dagster_celery.config import TASK_EXECUTE_JOB_NAME
from dagster_celery.make_app import make_app

from imagepipeline import machines
from imagepipeline.imaging.sandbox import DECODERS
from imagepipeline.locks import hold_lock
from imagepipeline.runtime import services
from imagepipeline.runtime.processes import rename
from imagepipeline.settings import Settings
from imagepipeline.stores import broker

# Modules that runs would otherwise import lazily; preloading lets the children share their memory.
# Never add LanceDB or onnxruntime: they start threads, which do not survive a fork.
PRELOADED = (
    *(
        "imagepipeline.services.openai_client",
        "openai.resources.chat.completions",
        "openai.resources.embeddings",
    ),
    *("httpcore2", "upath.core"),
    *("imagepipeline.instance.postgres_storage", "imagepipeline.instance.sqlite_storage"),
)
RESIDENT_COMMAND = [sys.executable, "-m", "imagepipeline.resident"]
HOUSEKEEPING_INTERVAL_SECONDS = 0.5
# A process stopped during a write holds the SQLite lock; the others give up waiting after 30 s.
STOPPED_SECONDS = 15
# After its first run, a child needs a third less CPU time per run (docs/performance.md).
RUNS_PER_CHILD = 20
# A used child holds about 70 MB of its own; a fresh one shares nearly all its memory.
IDLE_SECONDS = 10
DESCRIBE_SECONDS = 30


def main() -> None:
    """Runs the worker until it is stopped; on SIGTERM, it finishes its current runs first.

    Raises:
        SystemExit: Another worker already uses this home.
    """
    settings = Settings.load()
    hold_home(settings)
    settings.publish_resident_socket()
    preload(settings.definitions)
    build_app(settings).worker_main(
        [
            *(
                "--quiet",
                "worker",
                "--pool=prefork",
                f"--hostname={settings.worker_name}",
                f"--queues={broker.QUEUE}",
            ),
            *(
                f"--concurrency={settings.slots}",
                f"--max-tasks-per-child={RUNS_PER_CHILD}",
                f"--time-limit={settings.max_run_seconds}",
                "--loglevel=WARNING",
            ),
            *("--without-gossip", "--without-mingle", "--without-heartbeat", "-O", "fair"),
        ]
    )


def preload(definitions: str) -> None:
    """Imports what runs need, and builds the definitions of a module for all children to share."""
    for name in PRELOADED:
        importlib.import_module(name)
    module = importlib.import_module(definitions)
    made = module.defs()
    made.get_repository_def().load_all_definitions()
    vars(module)["defs"] = made  # Dagster looks for them here
    DECODERS.prepare()
    # Each child calls billiard's `set_pdeathsig`, for which cffi builds a parser of 6 MB. This call
    # builds it here, once, for all children to share.
    billiard.util.get_pdeathsig()


def hold_home(settings: Settings) -> None:
    """Locks the home for this worker until this process ends.

    Its children do not hold the lock. They end with it, but a little later: the next worker would
    be refused meanwhile.

    Raises:
        SystemExit: Another worker already uses this home.
    """
    lock, worker = acquire_lock(settings), os.getpid()

    def release() -> None:
        if os.getppid() == worker:  # in a child of a child, the number may be another file's
            os.close(lock)

    os.register_at_fork(after_in_child=release)


def acquire_lock(settings: Settings) -> int:
    """Locks the home for this worker and returns the lock's file descriptor.

    The descriptor is never closed, so the lock lasts as long as this process.

    Raises:
        SystemExit: Another worker already uses this home.
    """
    lock = hold_lock(settings.home / "worker.lock")
    if lock is None:
        sys.exit(f"another worker already uses {settings.home}: set a different IMAGEPIPELINE_HOME")
    return lock


def build_app(settings: Settings) -> Celery:
    """Returns the Celery app, with the task that dagster-celery's launcher sends."""
    url = broker.build_url(settings.broker_url)
    app = make_app(
        {"broker": url, "backend": url, "config_source": broker.build_config(settings.queue_prefix)}
    )  # type: ignore[no-untyped-call]
    app.task(execute_run, name=TASK_EXECUTE_JOB_NAME)
    housekeeper = Housekeeper(settings)

    class Housekeeping(bootsteps.StartStopStep):  # type: ignore[misc]
        """Makes the worker's event loop call the housekeeper at regular intervals."""

        requires = ("celery.worker.components:Pool", "celery.worker.components:Timer")

        def start(self, worker: Any) -> None:
            housekeeper.check(worker.pool)
            worker.timer.call_repeatedly(
                HOUSEKEEPING_INTERVAL_SECONDS, housekeeper.check, (worker.pool,)
            )

    app.steps["worker"].add(Housekeeping)

    @inspect_command(name=machines.COMMAND, args=[("mark", str)])  # type: ignore[untyped-decorator]
    def describe_machine(_: Any, mark: str) -> Any:
        # In a separate process: clients of object stores and databases start threads, and children
        # that are forked later must not inherit them.
        command = [sys.executable, "-m", machines.__name__, mark]
        shown = subprocess.run(
            command, capture_output=True, check=True, timeout=DESCRIBE_SECONDS
        ).stdout
        machine = json.loads(shown)
        machine["processes"]["zygote"] = DECODERS.is_alive()
        return machine

    @signals.worker_before_create_process.connect(weak=False)  # type: ignore[untyped-decorator]
    def share_memory(**_: Any) -> None:
        gc.freeze()  # otherwise garbage collection in a child would copy the shared memory pages

    @signals.worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]
    def rename_child(**_: Any) -> None:
        rename("run")

    return app


def execute_run(run_id: str) -> None:
    """Executes a run like dagster-celery's own task, but reuses one Dagster instance per child.

    A new instance for each run would take 80 ms and leave three Postgres connections open.
    """
    instance = open_instance()
    if keep_canceled(instance, run_id):
        return
    _execute_run_command_body(
        run_id, instance, write_stream_fn=lambda _: None, set_exit_code_on_failure=False
    )
    keep_canceled(instance, run_id)


def keep_canceled(instance: DagsterInstance, run_id: str) -> bool:
    """Marks a run as canceled again that was canceled before; returns whether it was.

    A cancel sets the run's status at once. Dagster may set another one later: when it queues or
    launches the run at that moment, or when a run ends that was canceled by force.
    """
    run = instance.get_run_by_id(run_id)
    if run is None or run.status in (DagsterRunStatus.CANCELED, DagsterRunStatus.SUCCESS):
        return False
    canceled = instance.get_records_for_run(run_id, of_type=DagsterEventType.RUN_CANCELED, limit=1)
    if canceled.records:
        instance.report_run_canceled(run, "It was canceled before.")
    return bool(canceled.records)


@functools.cache
def open_instance() -> DagsterInstance:
    """Returns this process's Dagster instance, which stays open until the process ends."""
    return DagsterInstance.get()


class Housekeeper:
    """Restarts the resident, kills stopped (SIGSTOP) processes and replaces used children."""

    def __init__(self, settings: Settings) -> None:
        self._environment = services.build_environment(settings, "resident")
        self._resident: subprocess.Popen[bytes] | None = None
        self._stopped: dict[int, float] = {}
        self._runs_seen = 0
        self._idle_since_seconds = math.inf

    def check(self, pool: Any) -> None:
        """Checks all processes of this worker once."""
        self._ensure_resident()
        self._kill_stopped()
        self._replace_idle_children(pool)

    def _replace_idle_children(self, pool: Any) -> None:
        """Frees the memory of used children, once after each busy period.

        The worker's event loop makes this call, so no task can reach a child in the meantime.
        """
        now_seconds = time.monotonic()
        runs = state.total_count.total()
        if state.reserved_requests or runs != self._runs_seen:
            self._runs_seen, self._idle_since_seconds = runs, now_seconds
        elif now_seconds - self._idle_since_seconds >= IDLE_SECONDS:
            self._idle_since_seconds = math.inf
            children, count = billiard.active_children(), pool.num_processes
            try:
                pool.shrink(count)
            except ValueError:  # a cancelled run has not ended yet; Celery has forgotten it already
                children = []  # the pool lets the idle ones end by themselves
            for child in children:
                os.kill(child.pid, signal.SIGKILL)  # a shutdown by the pool takes a second longer
                child.join()
            pool.grow(count - pool.num_processes)
            pool.maintain_pool()

    def _kill_stopped(self) -> None:
        pids = [
            process.pid
            for process in (*billiard.active_children(), self._resident)
            if process is not None
        ]
        now_seconds = time.monotonic()
        self._stopped = {
            pid: self._stopped.get(pid, now_seconds) for pid in pids if is_stopped(pid)
        }
        for pid, since_seconds in self._stopped.items():
            if now_seconds - since_seconds >= STOPPED_SECONDS:
                _log(
                    f"Killing process {pid}: it has been stopped (SIGSTOP) for {STOPPED_SECONDS} s."
                )
                os.kill(pid, signal.SIGKILL)

    def _ensure_resident(self) -> None:
        if self._resident is not None:
            if self._resident.poll() is None:
                return
            _log(f"The resident exited with code {self._resident.returncode}; restarting it.")
        # A new Python process, because LanceDB's threads do not survive a fork. The resident exits
        # when its standard input is closed.
        self._resident = subprocess.Popen(
            RESIDENT_COMMAND, stdin=subprocess.PIPE, env=self._environment
        )


def is_stopped(pid: int) -> bool:
    """Returns whether a signal has stopped the process; always False on systems without /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
