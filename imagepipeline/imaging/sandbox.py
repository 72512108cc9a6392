"""Sandbox: work on hostile bytes in a process that can do nothing else, and whose answers are not trusted.

The run asks a zygote (`imaging.zygote`), which it or the process it was forked from has started, for a child of its
own, and speaks with that on a socket. Nothing but bytes crosses it (`wire`).
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
START_SECONDS = 60  # for the zygote to be there: a busy machine imports slowly
FORK_SECONDS = 20
END_SECONDS = 5  # between the end of a child's connection and the news of its end
MAX_ANSWER_BYTES = 256_000_000  # six variants of the largest originals take less
# What a child may say of an image. Not of a claim, a pause or a store: the run acts on such errors.
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
    """What a call took: CPU seconds, seconds by the clock, and the process's peak of resident bytes so far."""

    cpu_seconds: Annotated[float, Field(ge=0, le=100_000)]
    wall_seconds: Annotated[float, Field(ge=0, le=100_000)]
    peak_bytes: Annotated[int, Field(ge=0, le=2**44)]


class Zygote:
    """The process children are forked from: started when it is first needed, or before by `prepare`.

    Processes that are forked from the one that prepared it share it. When the last of them has ended, it ends.

    Args:
        operations: the module that names what children can do.
    """

    def __init__(self, operations: str = OPERATIONS) -> None:
        self._operations = operations
        self._control: socket.socket | None = None
        self._confinement = Confinement(False, 0)
        self._process: subprocess.Popen[bytes] | None = None
        self._starter = 0
        self._lock = threading.Lock()

    def prepare(self) -> Confinement:
        """Starts it, unless it was started; what the kernel offers for its children.

        Raises:
            SandboxLostError: it could not be started.
        """
        with self._lock:
            if self._control is None:
                self._start()
            return self._confinement

    @property
    def descriptor(self) -> int | None:
        """What a forked process must keep open to share it; None where it was not started."""
        return self._control.fileno() if self._control else None

    def fork(self, memory_bytes: int, cpu_seconds: int) -> tuple[socket.socket, socket.socket, int]:
        """A child: the socket to speak with it, the one that tells its end and ends it when closed, its number.

        Raises:
            SandboxLostError: there is none to be had.
        """
        from imagepipeline.imaging.zygote import PROCESS, REQUEST

        request = REQUEST.pack(memory_bytes, cpu_seconds)
        for _ in range(2):  # it may have died: then the next one is asked
            self.prepare()
            session, theirs = socket.socketpair()
            life, watched = socket.socketpair()
            with theirs, watched, contextlib.suppress(OSError, AttributeError):
                socket.send_fds(self._control, [request], [theirs.fileno(), watched.fileno()])  # type: ignore[arg-type]
                watched.close()  # or its end would never come
                life.settimeout(FORK_SECONDS)
                answer = life.recv(PROCESS.size)
                if len(answer) == PROCESS.size:
                    return session, life, PROCESS.unpack(answer)[0]
            session.close()
            life.close()
            self.close()
        raise SandboxLostError(
            "the process that decodes and encodes images could not be forked: is memory short?"
        )

    def close(self) -> None:
        """Lets go of it; if this process started it, it is ended, and so are its children."""
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

        # Where the system has them, sockets that keep messages apart. Without: one is shorter than is ever split.
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
            reason = answer.decode(errors="replace") or "it ended without a word"
            raise SandboxLostError(
                f"the process that decodes images could not be started: {reason}"
            )
        self._control, self._confinement = ours, Confinement(*READY.unpack(answer))
        if not self._confinement.has_seccomp:
            log.warning(
                "The process that decodes images is not confined: %s. A decoder that an upload breaks into could do "
                "what this user may. See docs/security.md.",
                self._confinement.describe(),
            )


DECODERS = Zygote()


@dataclass(frozen=True)
class Sandbox:
    """Limits under which a child makes a value and works on it.

    `cpu_seconds` is over the child's life, `wall_seconds` a call. `is_confinement_required`: where the kernel filters
    no system calls, nothing is decoded. `zygote` is whose children are used.
    """

    memory_bytes: int = MEMORY_BYTES
    cpu_seconds: int = CPU_SECONDS
    wall_seconds: float = 60
    is_confinement_required: bool = False
    zygote: Zygote = field(default=DECODERS, repr=False, compare=False)

    def open(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Session[T]":
        """A session that holds `make(...)`, made and kept in the child; raises what `Session.call` raises.

        Raises:
            SandboxMissingError: confinement is required, and the kernel does not offer it.
        """
        if self.is_confinement_required and not self.zygote.prepare().has_seccomp:
            raise SandboxMissingError(
                "the kernel does not filter system calls here, and IMAGEPIPELINE_REQUIRE_CONFINEMENT forbids decoding "
                "without: `imagepipeline doctor` says more"
            )
        session: Session[T] = Session(self)
        try:
            session.usage = session.ask(make, args, None)[1]
        except BaseException:
            session.close()
            raise
        return session


class Session(Generic[T]):
    """A child process that holds a value; it ends with `close`, or when the process that opened it does."""

    usage: Usage  # of making the value
    process_id: int

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._connection, self._life, self.process_id = sandbox.zygote.fork(
            sandbox.memory_bytes, sandbox.cpu_seconds
        )
        self._stream = TimedStream(self._connection, sandbox.wall_seconds)
        self._begun: tuple[Any, ...] | None = None
        self._is_open = True

    def begin(
        self, function: Callable[Concatenate[T, P], Any], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Has the child work on a call that will be made later; what goes wrong is told then."""
        if self._begun is None:
            with contextlib.suppress(OSError, SandboxLostError):
                self._send(function, args)
                self._begun = (function, args)

    def call(
        self, function: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[R, Usage]:
        """What the function gives of the held value, and what it took.

        The function is one of the zygote's operations; its annotations say what crosses the border. Arguments are
        given by position. If the same call was begun before, that is the one whose answer is given.

        Raises:
            LimitError: it needed more memory or CPU time than allowed.
            SandboxLostError: it crashed, or took too long by the clock: on a busy machine that may go well next time.
            UnreadableImageError: the answer cannot be true, so that the image is not to be trusted.
            PermanentError: the verdict on the image.
            RuntimeError: whatever else the function raised.
        """
        return self.ask(function, args, result_kind(function))

    def ask(
        self, function: Callable[..., Any], args: tuple[Any, ...], kind: Any
    ) -> tuple[Any, Usage]:
        """As `call`, for an answer of that type."""
        begun, self._begun = self._begun, None
        if begun is not None and begun != (function, args):
            with contextlib.suppress(Exception):  # of a call that nobody made after all
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
        """Whether the child is there, as far as is known."""
        return self._is_open

    def distrust(self, what: str) -> NoReturn:
        """Ends the child after an answer that cannot be true.

        Raises:
            UnreadableImageError: always; it says what was wrong.
        """
        self.close()
        raise UnreadableImageError(
            f"decoding the image gave an answer that cannot be true, so it is refused: {what}"
        )

    def close(self) -> None:
        """Ends the child; safe to call twice."""
        self._is_open = False
        self._connection.close()
        self._life.close()  # the zygote kills the child when it sees that

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
        except (
            MalformedMessageError,
            RecursionError,
        ) as problem:  # the latter of JSON that is nested very deep
            self.distrust(str(problem))
        if isinstance(error, MemoryError):
            raise LimitError(
                f"decoding or encoding took more than {self._sandbox.memory_bytes / 1e6:,.0f} MB of memory "
                "(IMAGEPIPELINE_MAX_MEMORY_BYTES)"
            )
        raise error

    def _give_up(self) -> NoReturn:
        self.close()
        raise SandboxLostError(
            f"decoding or encoding took longer than {self._sandbox.wall_seconds:g} s"
        )

    def _explain_end(self) -> NoReturn:
        """The zygote knows how a child ended."""
        from imagepipeline.imaging.zygote import FAILED_TO_CONFINE, STATUS

        answer = b""
        with contextlib.suppress(OSError):
            self._life.settimeout(END_SECONDS)
            answer = self._life.recv(STATUS.size)
        self.close()
        if len(answer) != STATUS.size:
            raise SandboxLostError(
                "the process that decodes and encodes the image is gone, and nobody saw its end"
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
