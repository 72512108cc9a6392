"""Sandbox: work on hostile bytes in a process of its own, so that no image can take its caller along."""

import contextlib
import ctypes
import faulthandler
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
from typing import Any, Concatenate, Generic, NoReturn, ParamSpec, Self, TypeVar

from imagepipeline.errors import LimitError, SandboxLostError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Usage:
    """What a call took: CPU seconds, seconds by the clock, and the process's peak of resident bytes so far."""

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Sandbox:
    """Limits under which a forked child makes a value and works on it.

    Forked, because a new Python with Pillow costs 0.2 CPU-seconds and a fork some milliseconds; and kept, because
    moving decoded pixels between processes costs more than the fork (docs/decisions/0006-decoding-in-a-child.md).
    It limits what the work may use, not what it may see. `cpu_seconds` is over the child's life, `wall_seconds` a call.
    """

    memory_bytes: int = 2_000_000_000
    cpu_seconds: int = 20
    wall_seconds: float = 60

    def open(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Session[T]":
        """A session that holds `make(...)`, made and kept in the child; raises what `Session.call` raises."""
        session: Session[T] = Session(self, lambda: make(*args, **kwargs))
        try:
            session.usage = session.receive()[1]
        except BaseException:
            session.close()
            raise
        return session


class Session(Generic[T]):
    """A child process that holds a value; it ends with `close`, or when its parent does."""

    usage: Usage  # of making the value

    def __init__(self, sandbox: Sandbox, make: Callable[[], T]) -> None:
        self._sandbox = sandbox
        self._connection, theirs = multiprocessing.Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forking beside threads, and beside LanceDB: see _serve
            self._child = os.fork()
        if self._child == 0:
            self._connection.close()
            _serve(theirs, sandbox, make)
        theirs.close()
        self._status: int | None = None
        self._begun: tuple[Any, ...] | None = None

    def begin(self, function: Callable[Concatenate[T, P], Any], *args: P.args, **kwargs: P.kwargs) -> None:
        """Has the child work on a call that will be made later; what goes wrong is told then."""
        if self._begun is None:
            with contextlib.suppress(OSError):
                self._connection.send((function, args, kwargs))
                self._begun = (function, args, kwargs)

    def call(self, function: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> tuple[R, Usage]:
        """What the function gives of the held value, and what it took. Function, arguments and value are pickled.

        If the same call was begun before, that is the one whose answer is given.

        Raises:
            LimitError: it needed more memory or CPU time than allowed.
            SandboxLostError: it crashed, or took too long by the clock: on a busy machine that may go well next time.
            BaseException: whatever the function raised.
        """
        begun, self._begun = self._begun, None
        if begun == (function, args, kwargs):
            return self.receive()
        if begun is not None:
            with contextlib.suppress(Exception):  # of a call that nobody made after all
                self.receive()
        try:
            self._connection.send((function, args, kwargs))
        except OSError:
            self._explain_end()
        return self.receive()

    def receive(self) -> tuple[Any, Usage]:
        """The child's answer."""
        sandbox = self._sandbox
        if not self._connection.poll(sandbox.wall_seconds):
            self.close()
            raise SandboxLostError(f"decoding or encoding took longer than {sandbox.wall_seconds:g} s")
        try:
            value, error, usage = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._explain_end()
        if isinstance(error, MemoryError):
            raise LimitError(
                f"decoding or encoding took more than {sandbox.memory_bytes / 1e6:,.0f} MB of memory "
                "(IMAGEPIPELINE_MAX_MEMORY_BYTES)"
            )
        if error is not None:
            raise error
        return value, usage

    @property
    def is_open(self) -> bool:
        """Whether the child is there, as far as is known."""
        return self._status is None

    def close(self) -> None:
        """Ends the child; safe to call twice."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)
            self._status = os.waitpid(self._child, 0)[1]
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _explain_end(self) -> NoReturn:
        if self._status is None:  # wait, not kill: the signal it died of is the news
            self._status = os.waitpid(self._child, 0)[1]
            self._connection.close()
        number = os.WTERMSIG(self._status) if os.WIFSIGNALED(self._status) else 0
        if number == signal.SIGXCPU:
            limit = f"{self._sandbox.cpu_seconds} s of CPU time (IMAGEPIPELINE_MAX_CPU_SECONDS)"
            raise LimitError(f"decoding or encoding took more than {limit}")
        name = signal.Signals(number).name if number else f"exit code {os.waitstatus_to_exitcode(self._status)}"
        raise SandboxLostError(f"the process that decodes and encodes the image died ({name}): is the file damaged?")


def _serve(connection: Connection, sandbox: Sandbox, make: Callable[[], Any]) -> NoReturn:
    """The child: it computes, answers and ends, and so meets no lock another thread held when it was forked."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU):
            signal.signal(number, signal.SIG_DFL)
        faulthandler.disable()  # a decoder's crash is the parent's to tell
        gc.disable()  # a collection would touch, and so copy, the parent's memory
        silence = os.open(os.devnull, os.O_WRONLY)  # codecs write what an uploader made them write
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        _limit(sandbox)
        _keep_freed_memory()
        held: list[Any] = []
        _answer(connection, lambda: held.append(make()))
        while held:
            function, args, kwargs = connection.recv()  # EOFError when the parent has gone
            _answer(connection, lambda: function(held[0], *args, **kwargs))  # noqa: B023  (called at once)
    finally:
        os._exit(0)


def _answer(connection: Connection, function: Callable[[], Any]) -> None:
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    value, failure = None, None
    try:
        value = function()
    except BaseException as error:
        failure = error
        failure.__context__ = failure.__cause__ = failure.__traceback__ = None
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # Linux counts the peak in kB and macOS in bytes (getrusage(2)).
    usage = Usage(cpu_seconds, time.monotonic() - started, after.ru_maxrss * (1024 if Path("/proc").exists() else 1))
    try:
        connection.send((value, failure, usage))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        connection.send((None, RuntimeError(f"{failure or value!r:.100} could not be sent: {error}"), usage))


def _keep_freed_memory() -> None:
    """Has malloc reuse the memory of pictures instead of giving it back: half the time in the kernel, 80 ms a photo."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only; mallopt(3), malloc.h for the numbers
    if mallopt is not None:
        for option, value in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**24), (M_MMAP_THRESHOLD, 2**30)):
            mallopt(option, value)


def _limit(sandbox: Sandbox) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (sandbox.cpu_seconds, sandbox.cpu_seconds + 5))
    statistics = Path("/proc/self/statm")
    if statistics.exists():  # elsewhere (macOS) the kernel does not enforce a limit on memory
        mapped_bytes = int(statistics.read_text().split()[0]) * resource.getpagesize()
        limit = mapped_bytes + sandbox.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
