"""Child processes that do not outlive us, and cannot be hit by the terminal's Ctrl-C before we drain them."""

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

LOG_BYTES = 10_000_000
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Child(Protocol):
    """A child process, as `subprocess.Popen` shows it."""

    pid: int

    @property
    def returncode(self) -> int | None:
        """Its exit code, once `poll` or `wait` has seen its end."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit code; raises subprocess.TimeoutExpired if it runs on."""

    def terminate(self) -> None:
        """Sends it SIGTERM."""


def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Starts a process in a session of its own; its output is appended to `log`, which is cut at 10 MB per start."""
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


class Forked:
    """A child that shares with us what we have imported: `python -m MODULE ARGUMENTS` in a session of its own.

    Only a process with one thread may be forked. `leave` is called in the child first, to part with what is ours
    alone; `name` is what `ps -o comm` shows.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: Path, leave: Callable[[], None]) -> None:
        self._process = multiprocessing.get_context("fork").Process(target=_become, args=(name, arguments, log, leave))
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """As `Child.returncode`."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `Child.poll`."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        """As `Child.wait`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self._process.exitcode

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


def _open_log(log: Path) -> BinaryIO:
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        shutil.move(log, log.with_suffix(".old.log"))
    return open(log, "ab")


def _become(name: str, arguments: Sequence[str], log: Path, leave: Callable[[], None]) -> None:
    leave()
    os.setsid()
    _prepare_child()
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # it died before we asked to be told
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a new Python
    with _open_log(log) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    rename(name)
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def _prepare_child() -> None:
    # A shell that starts us with `&` ignores SIGINT for us and our children; Dagster's processes copy what they
    # find there to SIGTERM, and would then ignore both.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # elsewhere, `imagepipeline down` ends what a killed supervisor left behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
