"""The supervisor of the local stack: starts, restarts and drains all of its processes.

The processes are a Redis-compatible server, a worker, and Dagster's code server, daemon and
webserver.
"""

import contextlib
import fcntl
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from imagepipeline.errors import StackError
from imagepipeline.homes import make_home
from imagepipeline.locks import hold_lock
from imagepipeline.runtime import processes, services, valkey
from imagepipeline.settings import Settings, adopt_environment, is_secret
from imagepipeline.stores.files import FileStore

START_SECONDS = 90
STOP_SECONDS = 15
DRAIN_SECONDS = 180  # long enough for a run with three provider calls and the waits between them
RESTARTS_PER_MINUTE = 5
LOG_CHECK_SECONDS = 5
STATE_BYTES = 512
# A socket's path has at most 107 bytes (unix(7)). Multiprocessing adds 32 of them:
# /pymp-XXXXXXXX/listener-XXXXXXXX.
MAX_TEMPORARY_FOLDER_BYTES = 107 - 32


class Stack:
    """A context manager that starts all processes of one home on entry and drains them on exit.

    Call `wait` to keep the stack running; it restarts processes that die. Ctrl-C, SIGTERM and a
    closed terminal (SIGHUP) raise KeyboardInterrupt. A second Ctrl-C or SIGTERM stops everything
    without draining.
    """

    def __init__(
        self, settings: Settings, report: Callable[[str], None], reloads_code: bool = False
    ) -> None:
        self.webserver_url = ""
        self._settings = settings
        self._report = report
        self._reloads_code = reloads_code
        # The forkserver imports Dagster once, and all services share it. This is not safe with such
        # libraries on systems other than Linux, and would prevent code from being reloaded.
        is_shared = sys.platform == "linux" and not reloads_code
        self._context = multiprocessing.get_context("forkserver" if is_shared else "spawn")
        self._context.set_forkserver_preload(["imagepipeline.runtime.shared"])
        self._code_state = _read_code_state() if reloads_code else {}
        self._starters: dict[str, Callable[[], processes.Child]] = {}
        self._running: dict[str, processes.Child] = {}
        self._restarts: deque[float] = deque(maxlen=RESTARTS_PER_MINUTE)
        self._is_stopping = False
        self._is_forced = False
        self._logs_checked_at = 0.0

    def __enter__(self) -> Self:
        """Starts all processes and returns when the webserver and the worker are ready.

        Raises:
            StackError: Another stack uses this home, or a process did not start. No process is left
                running.
        """
        self._lock, self._last_port = _acquire_lock(self._settings)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Under nohup, SIGHUP stays ignored.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle_signal)
        try:
            self._start_all()
        except BaseException:
            self._stop_all()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drains the stack: starts no new runs, finishes current ones, then stops all processes."""
        self._stop_all()

    def wait(self, seconds: float = math.inf) -> None:
        """Supervises the processes for some seconds, or until a signal arrives.

        Raises:
            StackError: Processes keep dying.
            KeyboardInterrupt: A signal asked the stack to stop.
        """
        deadline = time.monotonic() + seconds
        while True:
            self._restart_dead()
            self._rotate_logs()
            if self._reloads_code:
                self._restart_on_change()
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return
            time.sleep(min(0.2, remaining))

    def _start_all(self) -> None:
        settings = self._settings
        services.prepare(settings)
        _keep_socket_names_short(settings)
        environments = {
            name: services.build_environment(settings, name) for name in services.SECRETS_OF
        }
        # Other children of this process, such as the forkserver, need no secrets.
        adopt_environment(
            {name: value for name, value in environments["daemon"].items() if not is_secret(name)}
        )
        if "://" not in settings.storage:
            FileStore(Path(settings.storage)).make_folder_of_originals()
        if not settings.has_own_redis:
            services.check_redis(settings)
        else:
            server_socket = settings.socket_folder / "valkey.sock"
            self._start(
                "redis",
                lambda: valkey.start_server(
                    settings.home / "valkey", server_socket, self._log("redis")
                ),
            )
        self._migrate(environments["migration"])

        def start(name: str, settings: Settings) -> None:
            command = services.build_command(settings, name)
            self._start(name, lambda: self._launch(name, command, environments[name]))

        start("code-server", settings)
        start("worker", settings)
        self._wait_until(lambda: services.answers_socket(settings.code_address), "code-server")
        start("daemon", settings)
        # Chosen as late as possible, so that no other stack takes the port first.
        settings = settings.model_copy(
            update={"webserver_port": _choose_port(settings, self._last_port)}
        )
        self.webserver_url = services.build_webserver_url(settings)
        start("webserver", settings)
        self._wait_until(
            lambda: services.answers_http(self.webserver_url + "/server_info"), "webserver"
        )
        self._wait_until(lambda: services.answers_socket(Path(settings.resident_address)), "worker")
        _write_state(self._lock, self.webserver_url, settings.webserver_port)

    def _launch(
        self, name: str, command: list[str], environment: dict[str, str]
    ) -> processes.Child:
        module_and_arguments = command[command.index("-m") + 1 :]
        return processes.Service(
            self._context, name, module_and_arguments, self._log(name), environment
        )

    def _migrate(self, environment: dict[str, str]) -> None:
        """Creates or updates the tables in a separate process."""
        process = self._launch("migrate", services.MIGRATION_COMMAND, environment)
        if process.wait() != 0:
            raise StackError(
                processes.read_tail(self._log("migrate"), 1)
                or "the tables could not be created or updated"
            )

    def _start(self, name: str, starter: Callable[[], processes.Child]) -> None:
        self._report(f"starting {name}")
        self._starters[name] = starter
        self._running[name] = starter()

    def _wait_until(self, is_ready: Callable[[], bool], name: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready():
            if self._running[name].poll() is not None or time.monotonic() > deadline:
                raise StackError(f"{name} did not start:\n{processes.read_tail(self._log(name))}")
            time.sleep(0.05)

    def _restart_dead(self) -> None:
        for name, process in list(self._running.items()):
            if process.poll() is None:
                continue
            if (
                len(self._restarts) == RESTARTS_PER_MINUTE
                and time.monotonic() - self._restarts[0] < 60
            ):
                raise StackError(
                    f"{name} keeps dying; its last log lines:\n"
                    f"{processes.read_tail(self._log(name))}"
                )
            self._restarts.append(time.monotonic())
            self._report(f"{name} exited with code {process.returncode}")
            self._start(name, self._starters[name])

    def _rotate_logs(self) -> None:
        if time.monotonic() - self._logs_checked_at < LOG_CHECK_SECONDS:
            return
        self._logs_checked_at = time.monotonic()
        for name in self._running:
            with contextlib.suppress(OSError):  # a full or failing disk must not end the stack
                processes.rotate(self._log(name))

    def _restart_on_change(self) -> None:
        state = _read_code_state()
        if state == self._code_state:
            return
        self._code_state = state
        self._report("the code has changed")
        # The daemon stops first, because a run that it hands to a draining code server would fail.
        for name in ("daemon", "worker", "code-server"):
            processes.stop(self._running[name], DRAIN_SECONDS)
        for name in ("code-server", "worker", "daemon"):
            self._start(name, self._starters[name])

    def _stop_all(self) -> None:
        self._is_stopping = True
        # The daemon stops first, so that no new run is dequeued; then the worker, whose runs need
        # the other processes.
        for name in ("daemon", "worker", "code-server", "webserver", "redis"):
            process = self._running.pop(name, None)
            if process is None:
                continue
            is_draining = name == "worker"
            self._report(
                "stopping worker after its current uploads" if is_draining else f"stopping {name}"
            )
            if not self._stop(process, DRAIN_SECONDS if is_draining else STOP_SECONDS):
                self._report(f"{name} did not stop in time and was killed")
        if self._starters:  # if nothing was started, the folder may not be ours
            shutil.rmtree(self._settings.socket_folder, ignore_errors=True)

    def _stop(self, process: processes.Child, patience_seconds: float) -> bool:
        """Stops a process; returns False if it had to be killed."""
        process.terminate()
        deadline = time.monotonic() + patience_seconds
        while process.poll() is None and time.monotonic() < deadline and not self._is_forced:
            time.sleep(0.05)
        return processes.stop(process, patience_seconds=0.1)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_stopping:
            # A closing terminal may send SIGHUP repeatedly, so only other signals force the stop.
            self._is_forced = self._is_forced or number != signal.SIGHUP
            return
        self._is_stopping = True
        self._report(
            "draining: finishing current uploads, the others stay queued; "
            "press Ctrl-C again to stop at once"
        )
        raise KeyboardInterrupt

    def _log(self, name: str) -> Path:
        return self._settings.home / "logs" / f"{name}.log"


def _keep_socket_names_short(settings: Settings) -> None:
    """Moves the forkserver's socket to our socket folder if the path of TMPDIR is too long."""
    if len(os.fsencode(tempfile.gettempdir())) > MAX_TEMPORARY_FOLDER_BYTES:
        tempfile.tempdir = str(settings.socket_folder)


def find_running(settings: Settings) -> dict[str, Any] | None:
    """Returns the state of the stack that uses this home, or None if no stack does.

    The state has the supervisor's `pid` and the `webserver_url`, which is None during the start.
    """
    try:
        with open(_lock_path(settings)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
    except BlockingIOError:
        state: dict[str, Any] = json.loads(_lock_path(settings).read_text())
        return state
    except FileNotFoundError:
        return None


def stop_running(settings: Settings, pid: int) -> None:
    """Asks the stack with this supervisor to drain and waits until it has ended."""
    os.kill(pid, signal.SIGTERM)
    while find_running(settings) is not None:
        time.sleep(0.1)


def _acquire_lock(settings: Settings) -> tuple[int, int | None]:
    """Locks the home; returns the lock's descriptor and the webserver's last port in this home.

    The descriptor is never closed, so the lock lasts exactly as long as this process.
    """
    make_home(settings)
    lock = hold_lock(_lock_path(settings))
    if lock is None:
        raise StackError(
            f"another stack already uses {settings.home}: stop it with `imagepipeline down`, "
            "or set another IMAGEPIPELINE_HOME"
        )
    port = _read_last_port(settings)
    _write_state(lock, None, port)
    return lock, port


def _write_state(lock: int, webserver_url: str | None, webserver_port: int | None) -> None:
    state = {"pid": os.getpid(), "webserver_url": webserver_url, "webserver_port": webserver_port}
    # All states have the same length, so that a concurrent reader always finds a complete one.
    os.pwrite(lock, json.dumps(state).encode().ljust(STATE_BYTES), 0)
    os.ftruncate(lock, STATE_BYTES)


def _read_last_port(settings: Settings) -> int | None:
    try:
        port = json.loads(_lock_path(settings).read_text())["webserver_port"]
    except (OSError, ValueError, KeyError, TypeError):  # a new home, or one from an older version
        return None
    return port if isinstance(port, int) and 0 < port < 65536 else None


def _lock_path(settings: Settings) -> Path:
    return settings.home / "stack.lock"


def _read_code_state() -> dict[str, int]:
    folder = Path(str(files("imagepipeline")))
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.py")}


def _choose_port(settings: Settings, last_port: int | None) -> int:
    """Chooses the webserver's port.

    A port that is set is the only choice. Otherwise, returns the first free one of: the last port,
    3000, any port.

    Raises:
        StackError: The webserver cannot listen on any of them.
    """
    host = settings.webserver_host
    wanted = settings.webserver_port
    for port in (wanted,) if wanted else (last_port, services.DEFAULT_WEBSERVER_PORT, 0):
        if port is None:
            continue
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            # Sets SO_REUSEADDR like the webserver, because old connections may linger for a minute.
            with socket.create_server((host, port), family=family) as candidate:
                return int(candidate.getsockname()[1])
        except OSError as error:
            problem = error.strerror or type(error).__name__
    raise StackError(
        f"the webserver cannot listen on {host}, {f'port {wanted}' if wanted else 'any port'} "
        f"({problem}): set another IMAGEPIPELINE_WEBSERVER_PORT, or stop the process that uses it"
    )
