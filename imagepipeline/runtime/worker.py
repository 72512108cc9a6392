"""The worker: a Celery worker whose children have everything imported, and execute Dagster's runs.

    python -m imagepipeline.runtime.worker

As many as wanted, on as many machines as wanted, each with a home of its own. A worker keeps one resident, for the
index and the offline models, and one zygote, from which the decoders are forked.
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
from dagster import DagsterInstance
from dagster._cli.api import _execute_run_command_body  # what `dagster api execute_run` calls
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import unpack_value
from dagster_celery.config import TASK_EXECUTE_JOB_NAME
from dagster_celery.make_app import make_app

from imagepipeline import machines
from imagepipeline.homes import hold_lock
from imagepipeline.imaging.sandbox import DECODERS
from imagepipeline.runtime import services
from imagepipeline.runtime.processes import rename
from imagepipeline.settings import Settings
from imagepipeline.stores import broker

# What runs import late; the children share it. What LanceDB and onnxruntime import starts threads: never here.
PRELOADED = (
    *(
        "imagepipeline.services.openai_client",
        "openai.resources.chat",
        "openai.resources.embeddings",
    ),
    *("httpcore2", "upath"),
)
RESIDENT_COMMAND = [sys.executable, "-m", "imagepipeline.resident"]
LOOK_SECONDS = 0.5
# A process that is stopped while it writes holds the lock of SQLite, for which all others wait 30 s before they fail.
STOPPED_SECONDS = 15
# A run in a child that has done one costs a third less CPU time than the first (docs/performance.md).
RUNS_PER_CHILD = 20
# A child that has worked keeps some 70 MB, a fresh one shares nearly all it has with the worker.
IDLE_SECONDS = 10
DESCRIBE_SECONDS = 10


def main() -> None:
    """Works until it is stopped; SIGTERM lets runs under way end.

    Raises:
        SystemExit: another worker uses this home.
    """
    settings = Settings.load()
    acquire_lock(settings)
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
                "--loglevel=WARNING",
            ),
            *("--without-gossip", "--without-mingle", "--without-heartbeat", "-O", "fair"),
        ]
    )


def preload(definitions: str) -> None:
    """Imports what runs need and builds the definitions of that module, for all children to share."""
    for name in PRELOADED:
        importlib.import_module(name)
    module = importlib.import_module(definitions)
    made = module.defs()
    made.get_repository_def().load_all_definitions()
    vars(module)["defs"] = made  # where Dagster looks for them
    DECODERS.prepare()


def acquire_lock(settings: Settings) -> int:
    """A descriptor that is never closed: it holds the home for one worker as long as this process lives."""
    lock = hold_lock(settings.home / "worker.lock")
    if lock is None:
        sys.exit(
            f"another worker uses {settings.home}: give this one an IMAGEPIPELINE_HOME of its own"
        )
    return lock


def build_app(settings: Settings) -> Celery:
    """The Celery app, with the task that dagster-celery's launcher asks for and our housekeeping."""
    url = broker.build_url(settings.broker_url)
    app = make_app(
        {"broker": url, "backend": url, "config_source": broker.build_config(settings.queue_prefix)}
    )  # type: ignore[no-untyped-call]
    app.task(execute_run, name=TASK_EXECUTE_JOB_NAME)
    keeper = Housekeeper(settings)

    class Housekeeping(bootsteps.StartStopStep):  # type: ignore[misc]
        """Has the worker's event loop call the housekeeper."""

        requires = ("celery.worker.components:Pool", "celery.worker.components:Timer")

        def start(self, worker: Any) -> None:
            keeper.look(worker.pool)
            worker.timer.call_repeatedly(LOOK_SECONDS, keeper.look, (worker.pool,))

    app.steps["worker"].add(Housekeeping)

    @inspect_command(name=machines.COMMAND, args=[("mark", str)])  # type: ignore[untyped-decorator]
    def describe_machine(_: Any, mark: str) -> Any:
        # By a process of its own: what object stores and databases leave here, such as threads, children would inherit.
        command = [sys.executable, "-m", machines.__name__, mark]
        return json.loads(
            subprocess.run(
                command, capture_output=True, check=True, timeout=DESCRIBE_SECONDS
            ).stdout
        )

    @signals.worker_before_create_process.connect(weak=False)  # type: ignore[untyped-decorator]
    def share_memory(**_: Any) -> None:
        gc.freeze()  # a collection in the child would touch, and so copy, all that was made so far

    @signals.worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]
    def note_child(**_: Any) -> None:
        rename("run")

    return app


def execute_run(execute_job_args_packed: Any) -> None:
    """Executes a run as dagster-celery's own task does, but with one Dagster instance for all runs of this child.

    An instance of its own for each run would leave three more connections to Postgres open, and take 80 ms to make.
    """
    run_id = unpack_value(execute_job_args_packed, as_type=ExecuteRunArgs).run_id
    _execute_run_command_body(
        run_id, open_instance(), write_stream_fn=lambda _: None, set_exit_code_on_failure=False
    )


@functools.cache
def open_instance() -> DagsterInstance:
    """The Dagster instance of this process, open as long as it lives."""
    return DagsterInstance.get()


class Housekeeper:
    """Keeps the resident alive, ends processes that were stopped (SIGSTOP), replaces children that have worked."""

    def __init__(self, settings: Settings) -> None:
        self._environment = services.build_environment(settings, "resident")
        self._resident: subprocess.Popen[bytes] | None = None
        self._stopped: dict[int, float] = {}
        self._runs_seen = 0
        self._idle_since_seconds = math.inf

    def look(self, pool: Any) -> None:
        """One look at all processes of this worker."""
        self._keep_resident()
        self._end_stopped()
        self._renew_when_idle(pool)

    def _renew_when_idle(self, pool: Any) -> None:
        """Gives back the memory of the children's runs, once after each time of work.

        The worker's event loop calls this, so that no task reaches a child meanwhile.
        """
        now_seconds = time.monotonic()
        runs = state.total_count.total()
        if state.reserved_requests or runs != self._runs_seen:
            self._runs_seen, self._idle_since_seconds = runs, now_seconds
        elif now_seconds - self._idle_since_seconds >= IDLE_SECONDS:
            self._idle_since_seconds = math.inf
            children, count = billiard.active_children(), pool.num_processes
            pool.shrink(count)
            for child in children:
                os.kill(child.pid, signal.SIGKILL)  # asked by the pool, it would end a second later
                child.join()
            pool.grow(count)
            pool.maintain_pool()

    def _end_stopped(self) -> None:
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
                _say(f"Process {pid} stood still for {STOPPED_SECONDS} s and is killed.")
                os.kill(pid, signal.SIGKILL)

    def _keep_resident(self) -> None:
        if self._resident is not None:
            if self._resident.poll() is None:
                return
            _say(f"The resident ended with code {self._resident.returncode} and is started again.")
        # A Python of its own: LanceDB's threads do not survive a fork. It ends when its standard input does.
        self._resident = subprocess.Popen(
            RESIDENT_COMMAND, stdin=subprocess.PIPE, env=self._environment
        )


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal; False where there is no /proc to tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
