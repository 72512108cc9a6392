"""Runs are forked from a process that is fit for it, and find everything imported."""

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.storage.sqlite import SQLITE_BUSY_TIMEOUT_SECONDS

from imagepipeline.models import Upload
from imagepipeline.runtime import services
from imagepipeline.runtime.code_server import STOPPED_SECONDS, kill_stopped
from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.files import FileStore
from imagepipeline_tests.conftest import PHOTOS

ROOT = Path(__file__).parents[2]


def run_warm(folder, *arguments, **environment):
    command = [sys.executable, "-m", "imagepipeline_tests.runtime.warm_run", str(folder), *arguments]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "IMAGEPIPELINE_HOME": str(folder), **environment}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(result.stdout)


@pytest.fixture
def home(tmp_path):
    """A home with the image `cat` waiting in it."""
    services.prepare(Settings.load({"IMAGEPIPELINE_HOME": str(tmp_path)}))
    with dg.DagsterInstance.from_config(str(tmp_path / "dagster")):
        pass  # makes its tables
    FileStore(tmp_path / "storage").put_original("cat", (PHOTOS / "cat.jpg").read_bytes(), "jpg")
    with closing(Catalogue(f"sqlite:///{tmp_path / 'catalogue.sqlite'}")) as catalogue:
        catalogue.migrate()
        catalogue.accept([Upload("cat")])
    return tmp_path


def test_a_forked_run_finds_everything_imported_but_what_must_not_be_forked(home, httpserver, redis_url):
    metadata = {"description": "A cat.", "tags": ["cat"], "category": "animal", "dominantColors": [], "mood": "calm"}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": json.dumps(metadata)}}
    common = {"model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1, "completion_tokens": 1}}
    httpserver.expect_request("/v1/chat/completions").respond_with_json(
        {"id": "1", "object": "chat.completion", "created": 1, "choices": [choice], **common}
    )
    httpserver.expect_request("/v1/embeddings").respond_with_json(
        {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}], **common}
    )
    provider = httpserver.url_for("/v1")
    done = run_warm(home, OPENAI_BASE_URL=provider, OPENROUTER_BASE_URL=provider, REDIS_URL=redis_url)
    assert done["status"] == "completed"
    assert done["is_shared"]  # the zygote is the preload's
    # There is no resident here, so the run imports LanceDB and what that needs itself; the rest is our concern.
    watched = ("dagster", "imagepipeline", "openai", "httpx2", "httpcore2", "sqlalchemy", "numpy", "redis", "PIL")
    late = {name for name in done["modules"] if name.split(".")[0] in watched}
    by_the_test = ("dagster._core.execution.execute_in_process", "dagster._core.instance.runs")  # its way to run a job
    assert [name for name in sorted(late) if not name.startswith(by_the_test)] == []


REHEARSAL = """
import os, signal, sys, tempfile, threading
from pathlib import Path
from imagepipeline.imaging.sandbox import DECODERS
from imagepipeline.runtime.rehearsal import rehearse

def list_open():
    paths = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    return {os.readlink(path) for path in paths if path.exists()}

DECODERS.prepare()  # as the preload does; its socket is for the runs
tempfile.tempdir = sys.argv[1]
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
known = list_open()
rehearse()
assert threading.active_count() == 1, threading.enumerate()
assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
assert list(Path(sys.argv[1]).iterdir()) == []
assert list_open() == known, list_open() - known
"""


def test_a_rehearsal_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-c", REHEARSAL, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr


def test_a_stop_that_comes_during_the_rehearsal_is_not_lost():
    code = (
        "import os, signal\n"
        "from imagepipeline.runtime import rehearsal\n"
        "process = rehearsal._process\n"
        "rehearsal._process = lambda *arguments: (os.kill(os.getpid(), signal.SIGTERM), process(*arguments))[1]\n"
        "rehearsal.rehearse()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == -signal.SIGTERM, result.stderr


@pytest.mark.parametrize("preload", ["preload_with_a_thread", "preload_that_fails"])
def test_a_preload_that_is_not_fit_is_refused(home, preload):
    assert "preload" in run_warm(home, f"imagepipeline_tests.runtime.{preload}")["error"]


def test_where_runs_cannot_be_forked_the_server_says_so_and_starts_them_as_dagster_does(home):
    code = (
        "import sys; from imagepipeline.runtime import code_server; code_server.CHECKED_DAGSTER = '0'; "
        "sys.argv = ['x', '--help']; code_server.main()"
    )
    environment = os.environ | {"IMAGEPIPELINE_HOME": str(home), "DAGSTER_HOME": str(home / "dagster")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "Runs start cold, 2 CPU-seconds each: checked with dagster 0, this is" in result.stderr
    assert "--module-name" in result.stdout  # Dagster's own server has taken over


def stop_while_writing(path: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_process_that_is_stopped_while_it_writes_is_killed_before_the_others_lose_patience(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=stop_while_writing, args=(str(tmp_path / "db"),))
    process.start()
    while not (stopped := kill_stopped({}, now_seconds=0)):
        time.sleep(0.05)
    with closing(sqlite3.connect(tmp_path / "db", timeout=0, isolation_level=None)) as connection:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            connection.execute("BEGIN IMMEDIATE")
        assert kill_stopped(stopped, now_seconds=STOPPED_SECONDS - 1) == stopped  # it may be let go on
        assert process.is_alive()
        kill_stopped(stopped, now_seconds=STOPPED_SECONDS)
        process.join(10)
        connection.execute("BEGIN IMMEDIATE")
    assert STOPPED_SECONDS < SQLITE_BUSY_TIMEOUT_SECONDS


def test_threads_and_processes_share_dagsters_sqlite_without_losing_an_event(home):
    code = (
        "import sys, dagster as dg\n"
        "with dg.DagsterInstance.from_config(sys.argv[1]) as instance:\n"
        "    for number in range(20):\n"
        "        event = dg.AssetMaterialization('a', partition=f'{sys.argv[2]}-{number}')\n"
        "        instance.report_runless_asset_event(event)\n"
    )
    folder = str(home / "dagster")
    first = subprocess.run([sys.executable, "-c", code, folder, "0"], check=False)
    writers = [subprocess.Popen([sys.executable, "-c", code, folder, str(number)]) for number in (1, 2, 3)]
    assert [first.returncode, *(writer.wait() for writer in writers)] == [0, 0, 0, 0]

    seen = []
    with dg.DagsterInstance.from_config(folder) as instance:
        assert len(instance.get_materialized_partitions(dg.AssetKey("a"))) == 80
        run = instance.create_run_for_job(dg.GraphDefinition("g").to_job())
        arrived = threading.Event()
        instance.watch_event_logs(run.run_id, None, lambda event, _: (seen.append(event), arrived.set()))
        time.sleep(0.1)
        instance.report_engine_event("hello", run)
        assert arrived.wait(10)
    assert "hello" in seen[0].message
