"""Child processes that end with their parent and do not receive the terminal's Ctrl-C."""

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
    """A child process, with the interface of `subprocess.Popen`."""

    pid: int

    @property
    def returncode(self) -> int | None:
        """The exit code that `poll` found last, or None while the process runs."""

    def poll(self) -> int | None:
        """Returns the exit code, or None while the process runs."""

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits up to `timeout` seconds for the process to end and returns its exit code.

        Raises:
            subprocess.TimeoutExpired: The process still runs.
        """

    def terminate(self) -> None:
        """Sends SIGTERM to the process."""


def start(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a process in its own session and appends its output to `log`."""
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
    """A `Child` that runs `python -m MODULE ARGUMENTS` in its own session and environment.

    Args:
        context: Starts the process; with a forkserver context, it shares the forkserver's imports.
        name: The process name that `ps -o comm` shows.
        arguments: The module and its arguments.
        log: The file to which output is appended.
        environment: The environment variables. They do not appear in `/proc/PID/environ`.
    """

    def __init__(
        self,
        context: BaseContext,
        name: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
    ) -> None:
        # Any, because the type stubs of BaseContext lack Process.
        self._process: Any = context.Process(  # type: ignore[attr-defined]
            target=_run_module, args=(name, list(arguments), log, dict(environment))
        )
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """See `Child.returncode`."""
        return self.poll()

    def poll(self) -> int | None:
        """See `Child.poll`."""
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int | None:
        """See `Child.wait`."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self.poll()

    def terminate(self) -> None:
        """See `Child.terminate`."""
        self._process.terminate()


def stop(process: Child, patience_seconds: float) -> bool:
    """Terminates a process, and kills all that is left of its process group.

    Returns:
        Whether the process ended by itself within `patience_seconds`.
    """
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
    """Returns the last lines of a log, or an empty string if it does not exist."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def rename(name: str) -> None:
    """Sets the name that `ps -o comm` and `top` show for this process, at most 15 characters."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def rotate(log: Path, limit_bytes: int = LOG_BYTES) -> None:
    """Moves the content of a log to `.old.log` once it exceeds the limit.

    The log is copied and truncated, so that writers, which append to it, can keep it open. Lines
    written during the rotation may be lost.
    """
    if not log.exists() or log.stat().st_size <= limit_bytes:
        return
    with contextlib.suppress(OSError):  # if the disk is full, truncating matters even more
        shutil.copyfile(log, log.with_suffix(".old.log"))
    os.truncate(log, 0)


def _open_log(log: Path) -> BinaryIO:
    log.parent.mkdir(parents=True, exist_ok=True)
    rotate(log)
    return open(log, "ab")


def _run_module(
    name: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]
) -> None:
    """Runs a module in a new child as if in a newly started Python."""
    os.setsid()
    _prepare_child()
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a newly started Python
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
    """Makes the kernel send SIGTERM to this process when the process that requested it dies.

    PR_SET_PDEATHSIG is not enough: the parent may be a forkserver, which outlives its requester.
    """
    parent = multiprocessing.parent_process()
    if parent is None or sys.platform != "linux":
        return
    # The sentinel is a pipe whose other end only the requester holds, so its death closes the pipe,
    # and the kernel signals that (fcntl(2), F_SETSIG).
    fcntl.fcntl(parent.sentinel, fcntl.F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(
        parent.sentinel, fcntl.F_SETFL, fcntl.fcntl(parent.sentinel, fcntl.F_GETFL) | os.O_ASYNC
    )
    if not parent.is_alive():  # it died before the signal was set up
        sys.exit()


def reset_signals() -> None:
    """Restores the defaults of the signals that stop a process, before a program starts in it.

    A shell that starts a command with `&` makes it and its children ignore SIGINT. Dagster's
    processes copy their SIGINT handler to SIGTERM and would then ignore both.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _prepare_child() -> None:
    reset_signals()
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it stays ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # On other systems, children survive a killed supervisor until `imagepipeline down` ends them.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
