"""The sandbox: decodes hostile bytes in a confined process whose answers the run does not trust.

A run asks a zygote (`imaging.zygote`) to fork a child, and talks to the child over a socket that
carries bytes only (`wire`). The zygote was started by the run itself, or by a process from which
the run was forked.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Concatenate, Generic, NoReturn, ParamSpec, Self, TypeVar

from pydantic import Field

from imagepipeline.errors import (
    EmptyOriginalError,
    LimitError,
    SandboxDownError,
    SandboxLostError,
    SandboxMissingError,
    TooLargeError,
    TruncatedImageError,
    UnreadableImageError,
    UnsupportedFormatError,
)
from imagepipeline.imaging.confinement import Confinement
from imagepipeline.imaging.limits import CPU_SECONDS, MEMORY_BYTES
from imagepipeline.text import clean
from imagepipeline.wire import (
    MalformedMessageError,
    TimedStream,
    read_message,
    restore_error,
    result_kind,
    validate,
    write_message,
)

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

OPERATIONS = "imagepipeline.imaging.operations"
START_SECONDS = 60  # for the zygote to start: a busy machine imports slowly
FORK_SECONDS = 20
END_SECONDS = 5  # between the end of a child's connection and the report of its exit status
MAX_ANSWER_BYTES = 256_000_000  # more than the default variants of the largest originals take
# Errors that a child may report. Errors about claims, pauses or stores are not among them, because
# the run would act on them.
VERDICTS = (
    EmptyOriginalError,
    TooLargeError,
    LimitError,
    UnsupportedFormatError,
    UnreadableImageError,
    TruncatedImageError,
)


@dataclass(frozen=True)
class Usage:
    """Resources used by a call.

    Attributes:
        cpu_seconds: CPU time.
        wall_seconds: elapsed time.
        peak_bytes: peak of the child's resident memory so far.
    """

    cpu_seconds: Annotated[float, Field(ge=0, le=100_000)]
    wall_seconds: Annotated[float, Field(ge=0, le=100_000)]
    peak_bytes: Annotated[int, Field(ge=0, le=2**44)]


class Zygote:
    """The process from which children are forked, started by `prepare` or when it is first needed.

    Processes forked from the one that started it share it. It ends when the last of them has ended.

    Args:
        operations: the module that lists the operations of the children.
    """

    def __init__(self, operations: str = OPERATIONS) -> None:
        self._operations = operations
        self._control: socket.socket | None = None
        self._confinement = Confinement(False, 0)
        self._process: subprocess.Popen[bytes] | None = None
        self._starter = 0
        self._lock = threading.Lock()

    def prepare(self) -> Confinement:
        """Starts the zygote if it is not running; returns the confinement of its children.

        Raises:
            SandboxDownError: the zygote could not be started.
        """
        with self._lock:
            if self._control is None:
                self._start()
            return self._confinement

    def is_alive(self) -> bool:
        """Whether the zygote that this process started is running."""
        return self._process is not None and self._process.poll() is None

    @property
    def descriptor(self) -> int | None:
        """The descriptor that a forked process must keep open to share the zygote.

        None if the zygote was not started.
        """
        return self._control.fileno() if self._control else None

    def fork(
        self, memory_bytes: int, cpu_seconds: int, niceness: int
    ) -> tuple[socket.socket, socket.socket, int]:
        """Forks a child.

        Args:
            memory_bytes: memory the child may use.
            cpu_seconds: CPU time the child may use.
            niceness: as in `Sandbox`.

        Returns:
            The socket to talk to the child; the socket on which the zygote reports the child's
            exit status, and whose closing makes the zygote kill the child; the child's process ID.

        Raises:
            SandboxDownError: no child could be forked.
        """
        from imagepipeline.imaging.zygote import PROCESS, REQUEST

        request = REQUEST.pack(memory_bytes, cpu_seconds, niceness)
        for _ in range(2):  # if the zygote has died, a second one is started
            self.prepare()
            session, theirs = socket.socketpair()
            life, watched = socket.socketpair()
            with theirs, watched, contextlib.suppress(OSError, AttributeError):
                descriptors = [theirs.fileno(), watched.fileno()]
                socket.send_fds(self._control, [request], descriptors)  # type: ignore[arg-type]
                watched.close()  # or we would never see that the other end is closed
                life.settimeout(FORK_SECONDS)
                answer = life.recv(PROCESS.size)
                if len(answer) == PROCESS.size:
                    return session, life, PROCESS.unpack(answer)[0]
            session.close()
            life.close()
            self.close()
        raise SandboxDownError(
            "the process that decodes and encodes images could not be forked: is memory low?"
        )

    def close(self) -> None:
        """Disconnects from the zygote; ends it and its children if this process started it."""
        with self._lock:
            if self._control is not None:
                self._control.close()
                self._control = None
            if self._process is not None and self._starter == os.getpid():
                self._process.kill()
                self._process.wait()
            self._process = None

    def _start(self) -> None:
        from imagepipeline.imaging.zygote import MAX_FAILURE_BYTES, READY

        # Sockets that preserve message boundaries, if the system has them. If not, our messages are
        # too short to be split.
        kind = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_STREAM
        ours, theirs = socket.socketpair(type=kind)
        command = [sys.executable, "-I", "-m", "imagepipeline.imaging.zygote", self._operations]
        silent = subprocess.DEVNULL
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=silent, stderr=silent, env={}, cwd="/"
            )
        self._starter = os.getpid()
        ours.settimeout(START_SECONDS)
        try:
            answer = ours.recv(MAX_FAILURE_BYTES)
        except OSError as error:
            answer = type(error).__name__.encode()
        if len(answer) != READY.size:
            ours.close()
            self._process.kill()
            self._process.wait()
            reason = answer.decode(errors="replace") or "it ended without a message"
            raise SandboxDownError(
                f"the process that decodes images could not be started: {reason}"
            )
        self._control, self._confinement = ours, Confinement(*READY.unpack(answer))
        if not self._confinement.has_seccomp:
            log.warning(
                "The process that decodes images is not confined: %s. An upload that takes over a "
                "decoder could do all that this user may do. See docs/security.md.",
                self._confinement.describe(),
            )


DECODERS = Zygote()


@dataclass(frozen=True)
class Sandbox:
    """Limits for the children that decode.

    Attributes:
        memory_bytes: memory of a child.
        cpu_seconds: CPU time over a child's life.
        wall_seconds: elapsed time of one call.
        is_confinement_required: decode nothing if the kernel cannot filter system calls.
        niceness: how far the child yields the CPU to other processes, 1 to 19; 0 if it yields only
            to children that were forked before it.
        zygote: the zygote that forks the children.
    """

    memory_bytes: int = MEMORY_BYTES
    cpu_seconds: int = CPU_SECONDS
    wall_seconds: float = 60
    is_confinement_required: bool = False
    niceness: int = 0
    zygote: Zygote = field(default=DECODERS, repr=False, compare=False)

    def open(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Session[T]":
        """Opens a session whose child computes and holds `make(...)`.

        Raises:
            SandboxDownError: no child can be started.
            SandboxMissingError: confinement is required, but the kernel does not support it.
            ImagePipelineError: any error that `Session.call` raises.
        """
        if self.is_confinement_required and not self.zygote.prepare().has_seccomp:
            raise SandboxMissingError(
                "the kernel does not filter system calls here, and "
                "IMAGEPIPELINE_REQUIRE_CONFINEMENT forbids decoding without: "
                "`imagepipeline doctor` says more"
            )
        session: Session[T] = Session(self)
        try:
            session.usage = session.ask(make, args, None)[1]
        except BaseException:
            session.close()
            raise
        return session


class Session(Generic[T]):
    """A child process that holds a value.

    The child ends with `close`, or when the process that opened the session ends.
    """

    usage: Usage  # for making the value
    process_id: int

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._connection, self._life, self.process_id = sandbox.zygote.fork(
            sandbox.memory_bytes, sandbox.cpu_seconds, sandbox.niceness
        )
        self._stream = TimedStream(self._connection, sandbox.wall_seconds)
        self._begun: tuple[Any, ...] | None = None
        self._is_open = True

    def begin(
        self, function: Callable[Concatenate[T, P], Any], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Starts a call in the child; the same call to `call` later returns its result or error."""
        if self._begun is None:
            with contextlib.suppress(OSError, SandboxLostError):
                self._send(function, args)
                self._begun = (function, args)

    def call(
        self, function: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[R, Usage]:
        """Calls a function on the held value in the child.

        If `begin` has already started the same call, its answer is returned.

        Args:
            function: one of the zygote's operations. Arguments and result are validated against
                its annotations.
            args: its arguments after the held value, by position.
            kwargs: none; operations take positional arguments only.

        Returns:
            The function's result, and the resources used.

        Raises:
            LimitError: the call needed more memory or CPU time than allowed.
            SandboxLostError: the child crashed, or the call took too long, which on a busy machine
                may succeed when tried again.
            UnreadableImageError: the answer is impossible, so the image is not trusted.
            PermanentError: the image is refused.
            RuntimeError: the function raised any other error.
        """
        return self.ask(function, args, result_kind(function))

    def ask(
        self, function: Callable[..., Any], args: tuple[Any, ...], kind: Any
    ) -> tuple[Any, Usage]:
        """Does the same as `call` for a result of type `kind`."""
        begun, self._begun = self._begun, None
        if begun is not None and begun != (function, args):
            with contextlib.suppress(Exception):  # the answer to a call not made after all
                self._receive(result_kind(begun[0]))
        if begun != (function, args):
            try:
                self._send(function, args)
            except TimeoutError:
                self._give_up()
            except OSError:
                self._explain_end()
        return self._receive(kind)

    @property
    def is_open(self) -> bool:
        """Whether the child is running, as far as is known."""
        return self._is_open

    def distrust(self, what: str) -> NoReturn:
        """Ends the child after an impossible answer.

        Args:
            what: the part of the answer that is impossible.

        Raises:
            UnreadableImageError: always.
        """
        self.close()
        raise UnreadableImageError(
            f"decoding the image gave an answer that cannot be true, so it is refused: {what}"
        )

    def close(self) -> None:
        """Ends the child; may be called twice."""
        self._is_open = False
        self._connection.close()
        self._life.close()  # which makes the zygote kill the child

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if not self._is_open:
            raise SandboxLostError("the process that decoded the image has ended")
        self._stream.allow(self._sandbox.wall_seconds)
        write_message(self._stream, [function.__name__, args])

    def _receive(self, kind: Any) -> tuple[Any, Usage]:
        self._stream.allow(self._sandbox.wall_seconds)
        try:
            answer = clean(read_message(self._stream, MAX_ANSWER_BYTES))
            parts = validate(dict[str, Any], answer)
            usage = validate(Usage, parts.pop("usage", None))
            if parts.keys() == {"value"}:
                return validate(kind, parts["value"]), usage
            error = restore_error(parts, (*VERDICTS, MemoryError))
        except TimeoutError:
            self._give_up()
        except (EOFError, OSError):
            self._explain_end()
        except (MalformedMessageError, RecursionError) as problem:  # deeply nested JSON recurses
            self.distrust(str(problem))
        if isinstance(error, MemoryError):
            raise LimitError(
                f"decoding or encoding took more than {self._sandbox.memory_bytes / 1e6:,.0f} MB "
                "of memory (IMAGEPIPELINE_MAX_MEMORY_BYTES)"
            )
        raise error

    def _give_up(self) -> NoReturn:
        self.close()
        raise SandboxLostError(
            f"decoding or encoding took longer than {self._sandbox.wall_seconds:g} s"
        )

    def _explain_end(self) -> NoReturn:
        """Raises the error for a child that has ended; the zygote reports its exit status."""
        from imagepipeline.imaging.zygote import FAILED_TO_CONFINE, STATUS

        answer = b""
        with contextlib.suppress(OSError):
            self._life.settimeout(END_SECONDS)
            answer = self._life.recv(STATUS.size)
        self.close()
        if len(answer) != STATUS.size:
            raise SandboxLostError(
                "the process that decodes and encodes the image has ended for an unknown reason"
            )
        (status,) = STATUS.unpack(answer)
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if number == signal.SIGXCPU:
            limit = f"{self._sandbox.cpu_seconds} s of CPU time (IMAGEPIPELINE_MAX_CPU_SECONDS)"
            raise LimitError(f"decoding or encoding took more than {limit}")
        if not number and os.waitstatus_to_exitcode(status) == FAILED_TO_CONFINE:
            raise SandboxLostError(
                "the kernel refused to confine the process that decodes the image"
            )
        name = (
            signal.Signals(number).name
            if number
            else f"exit code {os.waitstatus_to_exitcode(status)}"
        )
        raise SandboxLostError(
            f"the process that decodes and encodes the image died ({name}): is the file damaged?"
        )
