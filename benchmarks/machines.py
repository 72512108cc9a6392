"""Runs a fresh stack on Postgres, with a worker on each of several simulated machines."""

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.stack import SETTLE_SECONDS, Stack
from imagepipeline.runtime import services
from imagepipeline_tests.conftest import postgres_database, postgres_server, redis_server
from imagepipeline_tests.end_to_end.two_machines import Machine

START_SECONDS = 120


@contextmanager
def run_machines(environment: Mapping[str, str], workers: int) -> Iterator[Stack]:
    """Starts a stack without rate limit and webserver; kills and removes it afterwards.

    The machines share Postgres, Redis and a folder, and are all on this machine. CPU time and
    memory of the stack include this process, but not Postgres.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ip", dir="/tmp")))
        server_url = stack.enter_context(postgres_server())
        shared = {
            "REDIS_URL": stack.enter_context(redis_server()),
            "DATABASE_URL": stack.enter_context(postgres_database(server_url)),
            "DAGSTER_DATABASE_URL": stack.enter_context(postgres_database(server_url)),
            "IMAGEPIPELINE_STORAGE_ROOT": str(folder / "storage"),
            "IMAGEPIPELINE_INDEX_ROOT": str(folder / "index"),
            "IMAGEPIPELINE_RATE_LIMIT": "off",
            **environment,
        }
        machines = [Machine(folder, f"machine-{number}", shared) for number in range(workers)]
        for machine in machines:
            stack.callback(machine.kill)
        first = machines[0]
        first.run("migrate")
        first.start("code-server")
        first.start("daemon")
        for machine in machines:
            machine.start("worker")
        deadline = time.monotonic() + START_SECONDS
        while len(services.list_workers(first.settings)) < workers:
            if time.monotonic() > deadline:
                raise RuntimeError("".join(machine.read_log() for machine in machines))
        time.sleep(SETTLE_SECONDS)
        yield Stack(first.settings, os.getpid(), "")
