"""Workers kill stopped children, a home has one worker, and Dagster and Celery work as assumed."""

import inspect
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing

import billiard
import dagster as dg
import dagster_celery.config
import pytest
from celery import states
from celery.concurrency.prefork import TaskPool
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.events import DagsterEvent
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._core.storage.sqlite import SQLITE_BUSY_TIMEOUT_SECONDS
from dagster_celery.launcher import CeleryRunLauncher

from imagepipeline.runtime import daemon, services, webserver, worker
from imagepipeline.runtime.launcher import RunLauncher
from imagepipeline.settings import Settings
from imagepipeline.stores import broker
from imagepipeline.stores.broker import TaskQueue

pytestmark = pytest.mark.stack

TASK = "execute_job"


@pytest.fixture
def settings(tmp_path, redis_url, monkeypatch):
    """Settings of a home whose runs go through a real Redis."""
    monkeypatch.setenv("IMAGEPIPELINE_HOME", str(tmp_path))
    monkeypatch.setenv("REDIS_URL", redis_url)
    settings = Settings.load()
    services.prepare(settings)
    for name, value in services.build_environment(settings, "worker").items():
        monkeypatch.setenv(name, value)
    return settings


@pytest.fixture
def instance(settings):
    """The Dagster instance of the home."""
    with dg.DagsterInstance.from_config(str(settings.home / "dagster")) as instance:
        yield instance


def stop_while_writing(path: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_child_stopped_in_a_transaction_is_killed_before_others_time_out(
    settings, tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        worker, "RESIDENT_COMMAND", [sys.executable, "-c", "import sys; sys.stdin.read()"]
    )
    process = billiard.get_context("spawn").Process(
        target=stop_while_writing, args=(str(tmp_path / "db"),)
    )
    process.start()
    keeper = worker.Housekeeper(settings)
    try:
        while not worker.is_stopped(process.pid):
            time.sleep(0.05)
        keeper.check(pool=None)
        with closing(
            sqlite3.connect(tmp_path / "db", timeout=0, isolation_level=None)
        ) as connection:
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                connection.execute("BEGIN IMMEDIATE")
            now[0] = worker.STOPPED_SECONDS - 1
            keeper.check(pool=None)
            assert process.is_alive()  # it may still be continued
            now[0] = worker.STOPPED_SECONDS
            keeper.check(pool=None)
            process.join(10)
            assert process.exitcode == -signal.SIGKILL
            connection.execute("BEGIN IMMEDIATE")
        assert worker.STOPPED_SECONDS < SQLITE_BUSY_TIMEOUT_SECONDS
    finally:
        keeper._resident.kill()
        keeper._resident.wait()
        keeper._resident.stdin.close()


def read(fifo: str) -> None:
    with open(fifo, "rb") as source:
        source.read()


def test_a_cancelled_run_that_does_not_end_costs_no_other_slot(settings, tmp_path, monkeypatch):
    app = worker.build_app(settings)
    monkeypatch.setattr(worker.state, "total_count", Counter(["a run"]))
    monkeypatch.setattr(
        worker, "RESIDENT_COMMAND", [sys.executable, "-c", "import sys; sys.stdin.read()"]
    )
    now = [0.0]
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    keeper = worker.Housekeeper(settings)
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    pool = TaskPool(3, app=app, initargs=(app, "test"), threads=True)
    pool.start()
    try:
        has_begun = threading.Event()
        # Celery counts a cancelled run as ended at once.
        pool.apply_async(read, (fifo,), accept_callback=lambda *_: has_begun.set())
        assert has_begun.wait(30)
        keeper.check(pool)
        now[0] = worker.IDLE_SECONDS
        keeper.check(pool)
        assert pool.num_processes == 3
    finally:
        open(fifo, "wb").close()
        pool.stop()
        keeper._resident.kill()
        keeper._resident.wait()
        keeper._resident.stdin.close()


def test_a_home_has_one_worker(settings):
    lock = worker.acquire_lock(settings)
    with pytest.raises(
        SystemExit, match=r"another worker already uses .*set a different IMAGEPIPELINE_HOME"
    ):
        worker.acquire_lock(settings)
    os.close(lock)
    os.close(worker.acquire_lock(settings))


def test_a_worker_can_start_while_the_children_of_a_killed_one_still_end(settings):
    code = (
        "import os, signal\n"
        "from imagepipeline.runtime import worker\n"
        "from imagepipeline.settings import Settings\n"
        "worker.hold_home(Settings.load())\n"
        "if os.fork():\n"
        "    signal.pause()\n"
        "print('here', flush=True)\n"
        "input()"
    )
    environment = services.build_environment(settings, "worker")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as killed:
        assert killed.stdout.readline() == b"here\n"
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
        os.close(worker.acquire_lock(settings))
        killed.stdin.write(b"\n")


def test_preloading_starts_no_thread_and_builds_the_parser_that_each_child_needs(settings):
    code = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "from imagepipeline.runtime.worker import preload\n"
        "preload('imagepipeline.definitions')\n"
        "assert threading.active_count() == len(list(Path('/proc/self/task').iterdir())) == 1\n"
        "assert 'pycparser' in sys.modules"
    )
    environment = services.build_environment(settings, "worker")
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def launch(instance):
    """Launches a run for any worker; returns it as it was before."""
    pointer = ModuleCodePointer("imagepipeline.definitions", "defs")
    origin = JobPythonOrigin("g", RepositoryPythonOrigin(sys.executable, pointer))
    run = instance.create_run_for_job(dg.GraphDefinition("g").to_job(), job_code_origin=origin)
    instance.run_launcher.launch_run(LaunchRunContext(run, workspace=None))
    return run


def test_a_run_that_waits_for_a_worker_is_listed_and_healthy(settings, instance, redis_url):
    assert isinstance(instance.run_launcher, RunLauncher)
    run = launch(instance)
    with closing(TaskQueue(redis_url, settings.queue_prefix)) as tasks:
        assert tasks.list_waiting() == {run.run_id}
        tasks._redis.delete(f"{settings.queue_prefix}:runs:{broker.QUEUE}")
        assert tasks.list_waiting() == set()
    healthy = CheckRunHealthResult(WorkerStatus.RUNNING)
    assert instance.run_launcher.check_run_worker_health(run) == healthy
    assert (
        instance.run_launcher.check_run_worker_health(run.with_status(dg.DagsterRunStatus.STARTED))
        == healthy
    )
    unsent = instance.create_run_for_job(dg.GraphDefinition("h").to_job())
    assert instance.run_launcher.check_run_worker_health(unsent) == healthy
    assert not instance.run_launcher.supports_resume_run


def test_a_run_whose_worker_reports_its_death_has_failed(settings, instance):
    run = launch(instance)
    backend = instance.run_launcher.celery.backend
    backend.store_result(run.run_id, RuntimeError("signal 9"), states.FAILURE)
    health = instance.run_launcher.check_run_worker_health(run)
    assert health.status == WorkerStatus.FAILED
    key = backend.get_key_for_task(run.run_id)
    assert 0 < backend.client.ttl(key) <= broker.KEEP_FAILURES_SECONDS


def test_a_cancelled_run_is_marked_in_dagster(settings, instance):
    run = launch(instance)
    assert instance.run_launcher.terminate(run.run_id)
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.CANCELING
    instance.report_run_canceled(run)
    assert not instance.run_launcher.terminate(run.run_id)  # because it has ended


def test_dagster_celery_has_the_parts_that_launcher_and_worker_use(settings):
    assert dagster_celery.config.TASK_EXECUTE_JOB_NAME == TASK
    assert "celery" in CeleryRunLauncher.__annotations__
    assert issubclass(RunLauncher, CeleryRunLauncher)
    app = worker.build_app(settings)
    assert TASK in app.tasks
    assert app.conf.task_queues[0].name == broker.QUEUE
    assert app.conf.worker_disable_prefetch
    assert app.conf.broker_channel_error_retry  # otherwise a full Redis would end the worker


def test_dagsters_daemon_and_webserver_have_the_parts_that_ours_use():
    assert daemon.sensor.MIN_INTERVAL_LOOP_TIME == daemon.ORIGINAL_TICK_SECONDS
    assert daemon.controller.QueuedRunCoordinatorDaemon is daemon.QueuedRunCoordinatorDaemon
    assert "QueuedRunCoordinatorDaemon(" in inspect.getsource(daemon.controller)
    assert "MIN_INTERVAL_LOOP_TIME" in inspect.getsource(
        daemon.sensor.execute_sensor_iteration_loop
    )
    make = webserver.app.create_app_from_workspace_process_context
    assert webserver.cli.create_app_from_workspace_process_context is make
    assert "create_app_from_workspace_process_context(" in inspect.getsource(webserver.cli)


@pytest.mark.parametrize(
    ("redis_url", "celery_url"),
    [
        ("unix:///a/b.sock?db=2", "redis+socket:///a/b.sock?virtual_host=2"),
        ("unix:///a/b.sock", "redis+socket:///a/b.sock?virtual_host=0"),
        ("rediss://h/0", "rediss://h/0?ssl_cert_reqs=required"),
        ("redis://h:1/3", "redis://h:1/3"),
    ],
)
def test_redis_urls_are_translated_for_celery(redis_url, celery_url):
    assert broker.build_url(redis_url) == celery_url


def test_threads_and_processes_share_dagsters_sqlite_storage_without_losing_events(
    settings, instance
):
    code = (
        "import sys, dagster as dg\n"
        "with dg.DagsterInstance.from_config(sys.argv[1]) as instance:\n"
        "    for number in range(20):\n"
        "        event = dg.AssetMaterialization('a', partition=f'{sys.argv[2]}-{number}')\n"
        "        instance.report_runless_asset_event(event)\n"
    )
    folder = str(settings.home / "dagster")
    first = subprocess.run([sys.executable, "-c", code, folder, "0"], check=False)
    writers = [
        subprocess.Popen([sys.executable, "-c", code, folder, str(number)]) for number in (1, 2, 3)
    ]
    assert [first.returncode, *(writer.wait() for writer in writers)] == [0, 0, 0, 0]
    assert len(instance.get_materialized_partitions(dg.AssetKey("a"))) == 80
    seen, arrived = [], threading.Event()
    run = instance.create_run_for_job(dg.GraphDefinition("g").to_job())
    instance.watch_event_logs(
        run.run_id, None, lambda event, _: (seen.append(event), arrived.set())
    )
    time.sleep(0.1)
    instance.report_engine_event("hello", run)
    assert arrived.wait(10)
    assert "hello" in seen[0].message


@pytest.mark.parametrize("is_forced", [True, False])
def test_a_run_canceled_by_force_stays_canceled_when_it_ends(is_forced):
    with dg.DagsterInstance.ephemeral() as instance:
        run = instance.add_run(dg.DagsterRun(job_name="job", status=dg.DagsterRunStatus.STARTED))
        if is_forced:
            instance.report_run_canceled(run)
        instance.report_run_failed(instance.get_run_by_id(run.run_id))
        assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE
        worker.keep_canceled(instance, run.run_id)
        status = instance.get_run_by_id(run.run_id).status
        assert (status == dg.DagsterRunStatus.CANCELED) == is_forced


def test_a_run_canceled_in_the_moment_that_dagster_launched_it_is_not_executed(monkeypatch):
    with dg.DagsterInstance.ephemeral() as instance:
        run = instance.add_run(dg.DagsterRun(job_name="job"))
        instance.report_run_canceled(run)
        starting = DagsterEvent(dg.DagsterEventType.RUN_STARTING.value, run.job_name)
        instance.report_dagster_event(starting, run.run_id)
        assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.STARTING
        monkeypatch.setattr(worker, "open_instance", lambda: instance)
        worker.execute_run(run.run_id)  # it would fail, as it has no code
        assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.CANCELED
