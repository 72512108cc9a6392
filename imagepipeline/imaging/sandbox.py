"""Sandbox: a call in a process of its own, so that no image can take its caller along."""

import contextlib
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from imagepipeline.errors import LimitError, SandboxLostError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Usage:
    """What a call took: CPU seconds, seconds by the clock, and the process's peak of resident memory in bytes."""

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int


class Sandbox:
    """Calls functions in a forked child with limits on memory, CPU time and time by the clock.

    Forked, because a new Python with Pillow costs 0.2 CPU-seconds and a fork some milliseconds
    (docs/decisions/0006-decoding-in-a-forked-child.md). It limits what a call may use, not what it may see.
    """

    def __init__(self, memory_bytes: int = 1_000_000_000, cpu_seconds: int = 20, wall_seconds: float = 60) -> None:
        self._memory_bytes = memory_bytes
        self._cpu_seconds = cpu_seconds
        self._wall_seconds = wall_seconds

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, Usage]:
        """The function's value and what it took; its exceptions are raised here. Value and exceptions are pickled.

        Raises:
            LimitError: it needed more memory or CPU time than allowed.
            SandboxLostError: it crashed, or took too long by the clock: on a busy machine that may go well next time.
        """
        receiver, sender = multiprocessing.Pipe(duplex=False)
        started = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # see _run on forking beside threads
            child = os.fork()
        if child == 0:
            _run(sender, self._memory_bytes, self._cpu_seconds, lambda: function(*args, **kwargs))
        sender.close()
        try:
            outcome = self._receive(receiver)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            _, status, used = os.wait4(child, 0)
            receiver.close()
        if outcome is None:
            self._explain(status)
        value, error = outcome
        if isinstance(error, MemoryError):
            raise self._memory_error() from error
        if error is not None:
            raise error
        # Linux counts the peak in kB and macOS in bytes (getrusage(2)).
        peak_bytes = used.ru_maxrss * (1024 if Path("/proc").exists() else 1)
        return value, Usage(used.ru_utime + used.ru_stime, time.monotonic() - started, peak_bytes)

    def _receive(self, receiver: Connection) -> tuple[Any, BaseException | None] | None:
        """The (value, error) the child sent; None if it died."""
        if not receiver.poll(self._wall_seconds):
            raise SandboxLostError(f"decoding or encoding took longer than {self._wall_seconds:g} s")
        try:
            outcome: tuple[Any, BaseException | None] = receiver.recv()
        except EOFError:
            return None
        return outcome

    def _explain(self, status: int) -> NoReturn:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if number == signal.SIGXCPU:
            raise LimitError(
                f"decoding or encoding took more than {self._cpu_seconds} s of CPU time (IMAGEPIPELINE_MAX_CPU_SECONDS)"
            )
        name = signal.Signals(number).name if number else f"exit code {os.waitstatus_to_exitcode(status)}"
        raise SandboxLostError(f"the process that decoded or encoded the image died: {name}")

    def _memory_error(self) -> LimitError:
        return LimitError(
            f"decoding or encoding took more than {self._memory_bytes / 1e6:,.0f} MB of memory "
            "(IMAGEPIPELINE_MAX_MEMORY_BYTES)"
        )


def _run(sender: Connection, memory_bytes: int, cpu_seconds: int, function: Callable[[], Any]) -> NoReturn:
    """The child: it computes, sends and ends, and so meets no lock another thread held when it was forked."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU):
            signal.signal(number, signal.SIG_DFL)
        gc.disable()  # a collection would touch, and so copy, the parent's memory
        silence = os.open(os.devnull, os.O_WRONLY)  # codecs write what an uploader made them write
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        _limit(memory_bytes, cpu_seconds)
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = (function(), None)
        except BaseException as error:
            error.__context__ = error.__cause__ = None
            outcome = (None, error)
        try:
            sender.send(outcome)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            sender.send((None, RuntimeError(f"{outcome[1]!r} could not be sent: {error}")))
    finally:
        os._exit(0)


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
    statistics = Path("/proc/self/statm")
    if statistics.exists():  # elsewhere (macOS) the kernel does not enforce a limit on memory
        mapped_bytes = int(statistics.read_text().split()[0]) * resource.getpagesize()
        limit = mapped_bytes + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
