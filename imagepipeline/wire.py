"""Messages between our processes: JSON with bytes beside it, bounded and validated. Never a pickle, which is code.

A message is two lengths, the JSON, and the bytes that the JSON refers to in the order in which it does.
"""

import functools
import inspect
import json
import socket
import struct
import time
import typing
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from imagepipeline.text import make_printable

HEADER = struct.Struct("!IQ")  # lengths of the JSON and of the bytes
MAX_JSON_BYTES = 1_000_000
MAX_MESSAGE_CHARACTERS = 500  # of an error
BYTES = "$bytes"
# What is extra, not a number or longer is refused; a dataclass of ours takes this over from here.
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, str_max_length=100_000)


class MalformedMessageError(Exception):
    """What arrived is no message, is too long, or is not of the type that was expected."""


class Stream(Protocol):
    """Where messages are read from and written to."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Reads up to that many bytes; 0 at the end."""

    def write(self, data: memoryview, /) -> int | None:
        """Writes some of the bytes and says how many."""


class TimedStream:
    """A socket as a stream, with one deadline for all that is read or written until the next `allow`.

    The deadline is what a peer cannot stretch by sending a byte now and then.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self.allow(seconds)

    def allow(self, seconds: float) -> None:
        """Moves the deadline to that many seconds from now."""
        self._deadline = time.monotonic() + seconds

    def readinto(self, buffer: memoryview, /) -> int:
        """As `Stream`; raises TimeoutError."""
        self._connection.settimeout(self._remaining_seconds())
        return self._connection.recv_into(buffer)

    def write(self, data: memoryview, /) -> int:
        """As `Stream`; raises TimeoutError."""
        self._connection.settimeout(self._remaining_seconds())
        return self._connection.send(data)

    def _remaining_seconds(self) -> float:
        remaining_seconds = self._deadline - time.monotonic()
        if remaining_seconds <= 0:
            raise TimeoutError("the deadline for the message has passed")
        return remaining_seconds


def write_message(stream: Stream, value: object) -> None:
    """Sends JSON's values, bytes, dataclasses and pydantic's models, nested as one likes.

    Raises:
        TypeError: another value is among them.
        ValueError: a number is not finite, or the texts are too long.
        OSError: the peer has gone.
    """
    contents: list[bytes] = []

    def pack(part: object) -> object:
        if isinstance(part, bytes):
            contents.append(part)
            return {BYTES: len(part)}
        if isinstance(part, BaseModel):
            return part.model_dump()
        if is_dataclass(part):
            return {field.name: getattr(part, field.name) for field in fields(part)}
        raise TypeError(f"a {type(part).__name__} cannot be sent")

    text = json.dumps(value, default=pack, allow_nan=False).encode()
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{len(text):,} bytes of JSON are too long a message")
    for data in (HEADER.pack(len(text), sum(map(len, contents))) + text, *contents):
        rest = memoryview(data)
        while rest:
            rest = rest[stream.write(rest) or 0 :]


def read_message(stream: Stream, max_bytes: int) -> Any:
    """JSON's values and bytes as they were sent; of these there may be `max_bytes`.

    Raises:
        MalformedMessageError: it is no message, or too long.
        EOFError: the peer has gone.
        OSError: the peer has gone, or was too slow.
    """
    json_length, content_length = HEADER.unpack(_read(stream, HEADER.size))
    if json_length > MAX_JSON_BYTES or content_length > max_bytes:
        raise MalformedMessageError(
            f"a message of {json_length + content_length:,} bytes is too long"
        )
    text, contents = bytes(_read(stream, json_length)), memoryview(_read(stream, content_length))
    taken = 0

    def unpack(part: dict[str, Any]) -> Any:
        nonlocal taken
        if BYTES not in part:
            return part
        length = part[BYTES]
        if len(part) > 1 or type(length) is not int or not 0 <= length <= content_length - taken:
            raise ValueError("it refers to bytes that were not sent")
        taken += length
        return bytes(contents[taken - length : taken])

    try:
        value = json.loads(text, object_hook=unpack)
    except (ValueError, RecursionError) as error:
        raise MalformedMessageError(
            f"what arrived is no message ({type(error).__name__})"
        ) from None
    if taken != content_length:
        raise MalformedMessageError("a message has bytes that it does not refer to")
    return value


def validate(kind: Any, value: Any) -> Any:
    """The value as one of that type: a dataclass of ours, a tuple or list of them, a model, a plain value.

    Raises:
        MalformedMessageError: it is none.
    """
    try:
        return _adapt(kind).validate_python((value,))[0]
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        place = make_printable(".".join(map(str, problem["loc"][1:])))[:100]
        raise MalformedMessageError(
            f"{place or 'it'} is not as it must be ({problem['type']})"
        ) from None


def validate_arguments(function: Callable[..., Any], values: Any, given: int = 0) -> list[Any]:
    """The values as arguments of the function, by its annotations, after the `given` first ones.

    Raises:
        MalformedMessageError: they do not fit.
    """
    parameters = _parameters(function)[given:]
    required_count = sum(is_required for _, is_required in parameters)
    if not isinstance(values, list) or not required_count <= len(values) <= len(parameters):
        raise MalformedMessageError(f"{function.__name__} takes other arguments")
    return [validate(kind, value) for (kind, _), value in zip(parameters, values, strict=False)]


def prepare_arguments(function: Callable[..., Any], given: int = 0) -> None:
    """Makes what `validate_arguments` needs, which it would else do, and import for it, when it is first called."""
    for kind, _ in _parameters(function)[given:]:
        _adapt(kind)


def result_kind(function: Callable[..., Any]) -> Any:
    """The type the function gives, by its annotation."""
    return typing.get_type_hints(function, include_extras=True)["return"]


def describe_error(error: BaseException) -> dict[str, str]:
    """An error as a message: the name of its class, and what it says."""
    return {
        "error": type(error).__name__,
        "message": make_printable(str(error))[:MAX_MESSAGE_CHARACTERS],
    }


def restore_error(described: Any, kinds: Iterable[type[Exception]]) -> Exception:
    """An error as it was described, if it is one of those kinds, or else a RuntimeError that names it.

    Raises:
        MalformedMessageError: it is no such description.
    """
    names = validate(dict[str, str], described)
    if names.keys() != {"error", "message"} or len(names["message"]) > MAX_MESSAGE_CHARACTERS:
        raise MalformedMessageError("an error is not described as it must be")
    for kind in kinds:
        if kind.__name__ == names["error"]:
            return kind(names["message"])
    return RuntimeError(f"{names['error'][:80]}: {names['message']}")


def _read(stream: Stream, length: int) -> bytearray:
    data = bytearray(length)
    rest = memoryview(data)
    while rest:
        count = stream.readinto(rest)
        if not count:
            raise EOFError
        rest = rest[count:]
    return data


@functools.cache
def _adapt(kind: Any) -> TypeAdapter[tuple[Any]]:
    return TypeAdapter(
        tuple[kind], config=CONFIG
    )  # pydantic takes no configuration for a dataclass by itself


@functools.cache
def _parameters(function: Callable[..., Any]) -> list[tuple[Any, bool]]:
    """The type of each parameter, and whether it must be given."""
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return [(hints[one.name], one.default is inspect.Parameter.empty) for one in parameters]
