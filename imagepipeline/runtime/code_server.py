"""The warm code server: Dagster's own, with runs forked from a process that has imported everything already.

    python -m imagepipeline.runtime.code_server --socket PATH -m imagepipeline.definitions

Takes the arguments of `dagster api grpc`. Dagster starts each run in a new Python, which costs two CPU-seconds of
imports; here it costs a fork (docs/decisions/0008-warm-processes.md). Where the version of Dagster is not the one
this was checked with, or the preload is not fit to be forked, it says so and starts runs as Dagster does.
"""

import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NoReturn

from imagepipeline.imaging.sandbox import DECODERS
from imagepipeline.resident import serve
from imagepipeline.runtime.migration import bind_catalogue
from imagepipeline.runtime.processes import rename
from imagepipeline.settings import Settings

CHECKED_DAGSTER = "1.13.27"
PRELOAD = "imagepipeline.runtime.preload"
NAME = "forkserver"  # of the process runs are forked from, and of runs
RESTART_SECONDS = 0.5
# A socket's path has 107 bytes at most (unix(7)), of which multiprocessing adds /pymp-XXXXXXXX/listener-XXXXXXXX.
MAX_TEMPORARY_FOLDER_BYTES = 107 - 32
# A process that is stopped while it writes holds the lock of SQLite, for which all others wait 30 s before they fail.
STOPPED_SECONDS = 15


def main() -> None:
    """Serves until it is stopped."""
    settings = Settings.load()
    settings.publish_resident_socket()
    keep_socket_names_short(settings)
    try:
        fork_runs_from(prepare_context())
    except WarmStartError as error:
        print(f"Runs start cold, 2 CPU-seconds each: {error}", file=sys.stderr, flush=True)
    bind_catalogue(settings)  # after the fork, which may inherit no connection
    ended = threading.Event()
    for work, arguments in ((keep_resident, (settings, ended)), (watch_processes, ())):
        threading.Thread(target=work, args=arguments, daemon=True).start()
    from dagster._cli import main as run_dagster

    sys.argv = ["dagster", "api", "grpc", *sys.argv[1:]]
    try:
        run_dagster()  # type: ignore[no-untyped-call]
    finally:
        ended.set()


def keep_socket_names_short(settings: Settings) -> None:
    """Has temporary files, among them multiprocessing's sockets, beside ours where TMPDIR is too long for a socket."""
    if len(os.fsencode(tempfile.gettempdir())) > MAX_TEMPORARY_FOLDER_BYTES:
        tempfile.tempdir = str(settings.socket_folder)


class WarmStartError(Exception):
    """Runs cannot be forked here; the message says why."""


def keep_resident(settings: Settings, ended: threading.Event) -> None:
    """Starts the resident, and starts it again whenever it dies, until the server has ended and takes it along."""
    context = multiprocessing.get_context("spawn")  # LanceDB's threads do not survive a fork
    while True:
        resident = context.Process(target=serve, args=(settings.resident_address, settings.index_uri), daemon=True)
        resident.start()
        resident.join()
        if ended.wait(RESTART_SECONDS):  # printing now could abort the interpreter, which is closing its streams
            return
        print(f"The resident ended with code {resident.exitcode} and is started again.", file=sys.stderr, flush=True)


def watch_processes() -> NoReturn:
    """Ends runs, and the resident, that were stopped (SIGSTOP) and not let go on; looks every second."""
    stopped: dict[int, float] = {}
    while True:
        stopped = kill_stopped(stopped, time.monotonic())
        time.sleep(1)


def kill_stopped(known: dict[int, float], now_seconds: float) -> dict[int, float]:
    """Kills those of our processes that were stopped `STOPPED_SECONDS` ago; gives since when which are stopped."""
    pids = [process.pid for process in multiprocessing.active_children()]
    stopped = {pid: known.get(pid, now_seconds) for pid in pids if pid is not None and _is_stopped(pid)}
    for pid, since_seconds in stopped.items():
        if now_seconds - since_seconds >= STOPPED_SECONDS:
            print(f"Process {pid} stood still for {STOPPED_SECONDS} s and is killed.", file=sys.stderr, flush=True)
            os.kill(pid, signal.SIGKILL)
    return stopped


def prepare_context() -> BaseContext:
    """A context whose processes are forked from one that has imported what `runtime.preload` imports.

    Raises:
        WarmStartError: this is not Linux, not the Dagster it was checked with, or that process has threads.
    """
    if sys.platform != "linux":
        raise WarmStartError(f"forking from a prepared process was checked on Linux only, this is {sys.platform}")
    if version("dagster") != CHECKED_DAGSTER:
        raise WarmStartError(f"checked with dagster {CHECKED_DAGSTER}, this is {version('dagster')}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    thresholds = gc.get_threshold()
    try:
        importlib.import_module(PRELOAD)
    except Exception as error:
        raise WarmStartError(f"the preload failed ({type(error).__name__}: {error})") from error
    resource_tracker.ensure_running()  # multiprocessing's own helper, a new Python of 10 MB
    with _forked_not_spawned():
        forkserver.ensure_running()
    gc.set_threshold(*thresholds)  # the preload's are for runs, which are short
    # Python swallows what goes wrong in the preload, so a child is asked.
    probe = context.Process(target=_check_preload, args=(PRELOAD,))
    try:
        probe.start()
    except (EOFError, OSError) as error:
        raise WarmStartError(f"multiprocessing's server has ended ({type(error).__name__})") from error
    probe.join()
    if probe.exitcode != 0:
        raise WarmStartError("the preload failed, or left a thread; see the lines above")
    return context


@contextmanager
def _forked_not_spawned() -> Iterator[None]:
    """Has multiprocessing fork its server from this process, which has one thread yet, so that both share the preload.

    Should that server die, the next one is a new Python that imports the preload itself.
    """
    spawn, vars(util)["spawnv_passfds"] = util.spawnv_passfds, _fork_server
    try:
        yield
    finally:
        vars(util)["spawnv_passfds"] = spawn


def _fork_server(path: bytes, arguments: Sequence[str], kept: Sequence[int]) -> int:
    """Instead of a new Python with these arguments, the last of which is the server's code: a child that runs it."""
    util._flush_std_streams()  # type: ignore[attr-defined]
    pid = os.fork()
    if pid == 0:
        try:
            # The one it is starting us with is held.
            vars(forkserver._forkserver)["_lock"] = threading.Lock()
            shared = {*kept, DECODERS.descriptor}
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                if descriptor > 2 and descriptor not in shared:
                    with suppress(OSError):  # that of the listing itself
                        os.close(descriptor)
            rename(NAME)
            exec(arguments[-1], {})  # noqa: S102  (multiprocessing's own)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)
    return pid


def fork_runs_from(context: BaseContext) -> None:
    """Makes Dagster's server start its runs in this context instead of one that spawns a new Python."""
    from dagster._grpc import server

    original = server.DagsterApiServer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._mp_ctx = context  # private: hence CHECKED_DAGSTER

    type.__setattr__(server.DagsterApiServer, "__init__", init)


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal; False where there is no /proc to tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _check_preload(name: str) -> None:
    """In a child: everything was imported before the fork, and nothing came along."""
    sys.exit(importlib.import_module(name).explain_unfitness())


if __name__ == "__main__":
    main()
