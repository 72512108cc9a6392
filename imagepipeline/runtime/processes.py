"""Child processes that do not outlive us, and cannot be hit by the terminal's Ctrl-C before we drain them."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

LOG_BYTES = 10_000_000
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Starts a process in a session of its own; its output is appended to `log`, which is cut at 10 MB per start."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        shutil.move(log, log.with_suffix(".old.log"))
    with open(log, "ab") as output:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_prepare_child,
        )


def stop(process: subprocess.Popen[bytes], patience_seconds: float) -> bool:
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


def _prepare_child() -> None:
    # A shell that starts us with `&` ignores SIGINT for us and our children; Dagster's processes copy what they
    # find there to SIGTERM, and would then ignore both.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # elsewhere, `imagepipeline down` ends what a killed supervisor left behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
