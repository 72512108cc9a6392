"""The zygote: a small process that has imported the decoders and forks a confined child per image.

    python -I -m imagepipeline.imaging.zygote MODULE

`imaging.sandbox` starts it with an empty environment and one descriptor, 0: the socket on which it
receives requests for children. MODULE lists what a child can do: one of its `MAKERS` makes a value,
then its `CALLS` work on it. The zygote first calls the module's `warm_up`. See
docs/decisions/0006-decoding-in-a-child.md.
"""

import contextlib
import faulthandler
import gc
import importlib
import io
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, Self

# OpenBLAS starts threads on import, but a process that forks must have none. os.putenv sets the
# variable for C libraries only.
os.putenv("OPENBLAS_NUM_THREADS", "1")

from imagepipeline.imaging import complaints
from imagepipeline.imaging.confinement import Confinement, confine, end_with_parent
from imagepipeline.malloc import keep_freed_memory
from imagepipeline.wire import (
    describe_error,
    prepare_arguments,
    read_message,
    validate_arguments,
    write_message,
)

# A child's limits, memory in bytes and CPU time in seconds, and its niceness.
REQUEST = struct.Struct("!QQB")
PROCESS = struct.Struct("!i")  # the answer to a request: the child's process ID
STATUS = struct.Struct("!i")  # the report of a child's end: the status from waitpid
READY = struct.Struct("!?i")  # sent once the zygote is ready: the fields of Confinement
MAX_FAILURE_BYTES = 1000
MAX_DESCRIPTORS = 1024  # one per child
# HEIC takes a few threads. They count as processes of the whole machine, which can run out of them,
# and no limit of the kernel holds for one child.
MAX_THREADS, WATCH_SECONDS = 32, 0.2
MAX_REQUEST_BYTES = 2**40  # no real limit, because the run is trusted
FAILED_TO_CONFINE = 71  # exit code
# How far a child yields the CPU for each older one: else those of a burst all end at the same time,
# and the first image takes as long as five. Bounded, so that a single core still gives it a quarter
# beside a stream of younger ones, and its call ends within a minute; the bulk lane yields by 19.
YIELD_TO_OLDER, MAX_YIELD = 4, 8


def main() -> None:
    """Forks children until all processes that could request one have ended."""
    control = socket.socket(fileno=os.dup(0))
    try:
        module = importlib.import_module(sys.argv[1])
        operations = Operations.of(module.MAKERS, module.CALLS)
        module.warm_up()
        if _count_threads(os.getpid()) > 1:
            raise RuntimeError("the warm-up started a thread, so forking is not safe")
    except Exception as error:
        control.send(f"{type(error).__name__}: {error}".encode()[:MAX_FAILURE_BYTES])
        return
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(MAX_DESCRIPTORS, limit),) * 2)
    keep_freed_memory()
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, all this memory
    Zygote(control, operations).serve()


@dataclass(frozen=True)
class Operations:
    """The operations of children, by name."""

    makers: Mapping[str, Callable[..., Any]]
    calls: Mapping[str, Callable[..., Any]]

    @classmethod
    def of(cls, makers: Iterable[Callable[..., Any]], calls: Iterable[Callable[..., Any]]) -> Self:
        """Collects functions by name, and prepares the validation of their arguments."""
        found = cls({one.__name__: one for one in makers}, {one.__name__: one for one in calls})
        for function in found.makers.values():
            prepare_arguments(function)
        for function in found.calls.values():
            prepare_arguments(function, given=1)
        return found


class Zygote:
    """Forks children on request, reports how they ended, and kills them when the run has gone."""

    def __init__(self, control: socket.socket, operations: Operations) -> None:
        self._control = control
        self._operations = operations
        self._confinement = Confinement(False, 0)
        # By the child's process ID: the socket that tells the run how the child ended, and tells us
        # when the run has gone.
        self._watched: dict[int, socket.socket] = {}
        self._urgent: set[int] = set()  # children that yield to older ones alone
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        for one in (self._woken, self._waker):
            one.setblocking(False)
        self._selector.register(control, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ, self._reap)
        signal.signal(signal.SIGCHLD, _ignore)
        signal.set_wakeup_fd(self._waker.fileno())

    def serve(self) -> NoReturn:
        """Serves until all holders of the other end have gone, then kills all children."""
        self._confinement = _probe()
        self._control.send(
            READY.pack(self._confinement.has_seccomp, self._confinement.landlock_version)
        )
        self._control.setblocking(False)
        while True:
            for key, _ in self._selector.select(WATCH_SECONDS if self._watched else None):
                key.data()
            for process in self._watched:
                if _count_threads(process) > MAX_THREADS:
                    os.kill(process, signal.SIGKILL)

    def _accept(self) -> None:
        try:
            request, descriptors, *_ = socket.recv_fds(self._control, REQUEST.size, 2)
        except OSError:
            request = b""
        if not request:
            for process in self._watched:
                os.kill(process, signal.SIGKILL)
            os._exit(0)
        if len(request) != REQUEST.size or len(descriptors) != 2:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        session, watched = descriptors[0], socket.socket(fileno=descriptors[1])
        memory_bytes, cpu_seconds, niceness = REQUEST.unpack(request)
        is_urgent = not niceness
        if is_urgent:
            niceness = min(YIELD_TO_OLDER * len(self._urgent), MAX_YIELD)
        parent = os.getpid()
        try:
            process = os.fork()
        except OSError:  # the run sees the end of the connection
            process = -1
        if process == 0:
            self._become_child(session, parent, memory_bytes, cpu_seconds, niceness)
        os.close(session)
        if process < 0:
            watched.close()
            return
        watched.setblocking(False)
        self._watched[process] = watched
        if is_urgent:
            self._urgent.add(process)
        self._selector.register(watched, selectors.EVENT_READ, lambda: self._abandon(process))
        self._tell(watched, PROCESS.pack(process))

    def _abandon(self, process: int) -> None:
        """Kills a child whose run has closed its end of the connection, or has ended."""
        self._selector.unregister(self._watched[process])
        os.kill(process, signal.SIGKILL)  # not reaped yet, so the process ID is still its own

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            self._urgent.discard(process)
            watched = self._watched.pop(process, None)
            if watched is not None:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(watched)
                self._tell(watched, STATUS.pack(status))
                watched.close()

    def _tell(self, watched: socket.socket, message: bytes) -> None:
        with contextlib.suppress(OSError):  # the run has gone
            watched.send(message)

    def _become_child(
        self, session: int, parent: int, memory_bytes: int, cpu_seconds: int, niceness: int
    ) -> NoReturn:
        try:
            os.nice(niceness)
            stream = _isolate(session, parent)
            if confine(memory_bytes, cpu_seconds) != self._confinement:
                os._exit(FAILED_TO_CONFINE)  # never run with less than the probe found
            serve(stream, self._operations)
        finally:
            os._exit(0)


def serve(stream: io.FileIO, operations: Operations) -> None:
    """Makes a value and calls operations on it until the run disconnects; runs in a child."""
    held: list[Any] = []
    while True:
        try:
            name, arguments = read_message(stream, MAX_REQUEST_BYTES)
        except EOFError:  # the run has disconnected
            return
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
        answer: dict[str, Any]
        try:
            function = (operations.calls if held else operations.makers)[name]
            values = validate_arguments(function, arguments, given=len(held))
            value = function(*held, *values)
            answer = {"value": value if held else None}
            if not held:
                held.append(value)
        except BaseException as error:  # the run handles it
            answer = describe_error(error)
        after = resource.getrusage(resource.RUSAGE_SELF)
        usage = {
            "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "wall_seconds": time.monotonic() - started,
            # Linux counts the peak in kB and macOS in bytes (getrusage(2)).
            "peak_bytes": after.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }
        try:
            write_message(stream, answer | {"usage": usage})
        except (TypeError, ValueError) as error:
            refused = RuntimeError(f"the result of {name} could not be sent: {error}")
            write_message(stream, describe_error(refused) | {"usage": usage})


def _isolate(session: int, parent: int) -> io.FileIO:
    """Cuts a child's ties to the zygote, except that the child ends when the zygote does.

    Descriptor 0 becomes the session's socket, 1 remains /dev/null, 2 becomes a pipe to the child
    itself, and all others are closed.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(parent)
    faulthandler.disable()  # the run reports the crash of a decoder
    gc.disable()
    os.dup2(session, 0)
    os.closerange(3, MAX_DESCRIPTORS)
    complaints.redirect()
    return io.FileIO(0, "r+", closefd=False)


def _probe() -> Confinement:
    """Finds out in a child what confinement the kernel supports."""
    ours, theirs = socket.socketpair()
    process = os.fork()
    if process == 0:
        try:
            found = confine(2**40, 20)
            os.write(theirs.fileno(), READY.pack(found.has_seccomp, found.landlock_version))
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        answer = ours.recv(READY.size)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process, 0)
    return (
        Confinement(*READY.unpack(answer)) if len(answer) == READY.size else Confinement(False, 0)
    )


def _count_threads(process: int) -> int:
    try:
        return len(os.listdir(f"/proc/{process}/task"))
    except OSError:  # it is no Linux, or the process has just ended
        return 1


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Does nothing; a signal wakes the selector only if it has a handler."""


if __name__ == "__main__":
    main()
