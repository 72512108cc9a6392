"""Child processes that do not outlive us, and cannot be hit by the terminal's Ctrl-C before we drain them."""

import contextlib
import ctypes
import fcntl
import logging
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from imagepipeline.settings import adopt_environment

LOG_BYTES = 10_000_000
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Child(Protocol):
    """A child process, as `subprocess.Popen` shows it."""

    pid: int

    @property
    def returncode(self) -> int | None:
        """Its exit code, or None while it runs, as `poll` found last."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit code; raises subprocess.TimeoutExpired if it runs on."""

    def terminate(self) -> None:
        """Sends it SIGTERM."""


def start(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a process in a session of its own; its output is appended to `log`."""
    with _open_log(log) as output:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_prepare_child,
        )


class Service:
    """A module run as `python -m MODULE ARGUMENTS`, in a session and with an environment of its own, as a `Child`.

    `context` says how it comes to be: of a forkserver, it shares what that has imported. Its variables stand in no
    `/proc/PID/environ`. `name` is what `ps -o comm` shows; its output is appended to `log`.
    """

    def __init__(
        self,
        context: BaseContext,
        name: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
    ) -> None:
        # Typed loosely, as a context's Process is known to no stub.
        self._process: Any = context.Process(  # type: ignore[attr-defined]
            target=_become, args=(name, list(arguments), log, dict(environment))
        )
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As `poll`."""
        return self.poll()

    def poll(self) -> int | None:
        """As `Child.poll`."""
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int | None:
        """As `Child.wait`."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self.poll()

    def terminate(self) -> None:
        """As `Child.terminate`."""
        self._process.terminate()


def stop(process: Child, patience_seconds: float) -> bool:
    """Asks a process to end and waits; gives False if it, and all it started, had to be killed."""
    process.terminate()
    try:
        process.wait(patience_seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def rename(name: str) -> None:
    """What `ps -o comm` and `top` show of this process; of its name, 15 characters."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def rotate(log: Path, limit_bytes: int = LOG_BYTES) -> None:
    """Moves what a log holds to `.old.log` once it is longer than the limit; whoever writes to it need not know.

    It is copied and truncated, as logs are opened to append. Lines that arrive meanwhile may be lost.
    """
    if not log.exists() or log.stat().st_size <= limit_bytes:
        return
    with contextlib.suppress(OSError):  # no room for a copy is one more reason to truncate
        shutil.copyfile(log, log.with_suffix(".old.log"))
    os.truncate(log, 0)


def _open_log(log: Path) -> BinaryIO:
    log.parent.mkdir(parents=True, exist_ok=True)
    rotate(log)
    return open(log, "ab")


def _become(name: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """In a new child: runs a module as a new Python would."""
    os.setsid()
    _prepare_child()
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a new Python
    with _open_log(log) as output, open(os.devnull, "rb") as nothing:
        for descriptor, file in enumerate((nothing, output, output)):
            os.dup2(file.fileno(), descriptor)
    rename(name)
    adopt_environment(environment)
    sys.argv = list(arguments)
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    finally:
        logging.shutdown()


def _end_with_parent() -> None:
    """Has the kernel send this process SIGTERM when whoever asked for it dies.

    A forkserver, whose child it may be, does not die with them: its children keep it alive.
    """
    parent = multiprocessing.parent_process()
    if parent is None or sys.platform != "linux":
        return
    # A pipe whose other end only they hold: a signal says that it was closed (fcntl(2), F_SETSIG).
    fcntl.fcntl(parent.sentinel, fcntl.F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(
        parent.sentinel, fcntl.F_SETFL, fcntl.fcntl(parent.sentinel, fcntl.F_GETFL) | os.O_ASYNC
    )
    if not parent.is_alive():  # they died before we asked to be told
        sys.exit()


def _prepare_child() -> None:
    # A shell that starts us with `&` ignores SIGINT for us and our children; Dagster's processes copy what they
    # find there to SIGTERM, and would then ignore both.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it stays ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if (
        sys.platform == "linux"
    ):  # elsewhere, `imagepipeline down` ends what a killed supervisor left behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
