"""Child processes that do not outlive us, and cannot be hit by the terminal's Ctrl-C before we drain them."""

import atexit
import contextlib
import ctypes
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

LOG_BYTES = 10_000_000
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Child(Protocol):
    """A child process, as `subprocess.Popen` shows it."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit code; raises subprocess.TimeoutExpired if it runs on."""

    def terminate(self) -> None:
        """Sends it SIGTERM."""


def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
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


class Forked:
    """A child that shares with us what we have imported: `python -m MODULE ARGUMENTS` in a session of its own.

    Only a process with one thread may be forked. `leave` is called in the child first, to part with what is ours
    alone; `name` is what `ps -o comm` shows.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: Path, leave: Callable[[], None]) -> None:
        self.returncode: int | None = None
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                leave()
                code = _become(name, arguments, log, parent)
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        """As `Child.poll`."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """As `Child.wait`."""
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(0.01)
        return self.returncode

    def terminate(self) -> None:
        """As `Child.terminate`."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


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


def _become(name: str, arguments: Sequence[str], log: Path, parent: int) -> int:
    """In a child that was just forked: runs a module as a new Python would, and gives the exit code."""
    os.setsid()
    _prepare_child()
    if os.getppid() != parent:  # it died before we asked to be told
        return 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a new Python
    with _open_log(log) as output, open(os.devnull, "rb") as nothing:
        for descriptor, file in enumerate((nothing, output, output)):
            os.dup2(file.fileno(), descriptor)
    rename(name)
    sys.argv = list(arguments)
    code = 0
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as Python itself does at its end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _prepare_child() -> None:
    # A shell that starts us with `&` ignores SIGINT for us and our children; Dagster's processes copy what they
    # find there to SIGTERM, and would then ignore both.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it stays ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if sys.platform == "linux":  # elsewhere, `imagepipeline down` ends what a killed supervisor left behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
