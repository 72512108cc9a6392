"""Messages between our processes: JSON and binary data, limited in size and validated.

We never use pickle, because loading a pickle can run code. A message consists of two lengths, the
JSON, and the binary values to which the JSON refers, in order.
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
# Refuses extra fields, NaN, infinity and longer strings, also in dataclasses.
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, str_max_length=100_000)


class MalformedMessageError(Exception):
    """The received data is not a message, is too long, or does not have the expected type."""


class Stream(Protocol):
    """A binary stream that messages are read from and written to."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Reads bytes into the buffer and returns their number; 0 means the end of the stream."""

    def write(self, data: memoryview, /) -> int | None:
        """Writes some of the bytes and returns their number."""


class TimedStream:
    """A socket as a stream, with one deadline for all reads and writes until the next `allow`.

    Unlike a socket's timeout, the deadline cannot be stretched by a peer that sends single bytes.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self.allow(seconds)

    def allow(self, seconds: float) -> None:
        """Sets the deadline to `seconds` from now."""
        self._deadline = time.monotonic() + seconds

    def readinto(self, buffer: memoryview, /) -> int:
        """See `Stream.readinto`; raises TimeoutError after the deadline."""
        self._connection.settimeout(self._remaining_seconds())
        return self._connection.recv_into(buffer)

    def write(self, data: memoryview, /) -> int:
        """See `Stream.write`; raises TimeoutError after the deadline."""
        self._connection.settimeout(self._remaining_seconds())
        return self._connection.send(data)

    def _remaining_seconds(self) -> float:
        remaining_seconds = self._deadline - time.monotonic()
        if remaining_seconds <= 0:
            raise TimeoutError("the deadline for the message has passed")
        return remaining_seconds


def write_message(stream: Stream, value: object) -> None:
    """Sends a value: JSON types, bytes, dataclasses and pydantic models, in any nesting.

    Raises:
        TypeError: The value contains another type.
        ValueError: A number is not finite, or the JSON is too long.
        OSError: The peer is gone.
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
        raise ValueError(f"a message with {len(text):,} bytes of JSON is too long")
    for data in (HEADER.pack(len(text), sum(map(len, contents))) + text, *contents):
        rest = memoryview(data)
        while rest:
            rest = rest[stream.write(rest) or 0 :]


def read_message(stream: Stream, max_bytes: int) -> Any:
    """Reads a value of JSON types and bytes; its binary part may have up to `max_bytes`.

    Raises:
        MalformedMessageError: The data is not a message, or is too long.
        EOFError: The peer is gone.
        OSError: The peer is gone, or was too slow.
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
            f"the received data is not a message ({type(error).__name__})"
        ) from None
    if taken != content_length:
        raise MalformedMessageError("a message contains bytes to which its JSON does not refer")
    return value


def validate(kind: Any, value: Any) -> Any:
    """Returns a received value as a `kind`: a dataclass, a model, a JSON type, or a list or tuple.

    Raises:
        MalformedMessageError: The value is not a `kind`.
    """
    try:
        return _adapt(kind).validate_python((value,))[0]
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        place = make_printable(".".join(map(str, problem["loc"][1:])))[:100]
        raise MalformedMessageError(
            f"{place or 'the value'} is invalid ({problem['type']})"
        ) from None


def validate_arguments(function: Callable[..., Any], values: Any, given: int = 0) -> list[Any]:
    """Returns received values as arguments of a function, validated by its annotations.

    `given` is the number of leading parameters that are not among the values.

    Raises:
        MalformedMessageError: The values do not fit the parameters.
    """
    parameters = _parameters(function)[given:]
    required_count = sum(is_required for _, is_required in parameters)
    if not isinstance(values, list) or not required_count <= len(values) <= len(parameters):
        raise MalformedMessageError(f"{function.__name__} takes another number of arguments")
    return [validate(kind, value) for (kind, _), value in zip(parameters, values, strict=False)]


def prepare_arguments(function: Callable[..., Any], given: int = 0) -> None:
    """Builds the validators for `validate_arguments`, whose first call would otherwise do this."""
    for kind, _ in _parameters(function)[given:]:
        _adapt(kind)


def result_kind(function: Callable[..., Any]) -> Any:
    """Returns the annotated return type of a function."""
    return typing.get_type_hints(function, include_extras=True)["return"]


def describe_error(error: BaseException) -> dict[str, str]:
    """Returns an error as a message: the name of its class, and its text."""
    return {
        "error": type(error).__name__,
        "message": make_printable(str(error))[:MAX_MESSAGE_CHARACTERS],
    }


def restore_error(described: Any, kinds: Iterable[type[Exception]]) -> Exception:
    """Returns the error described by `describe_error`.

    Its class is one of `kinds`, or else RuntimeError with the original class in its text.

    Raises:
        MalformedMessageError: The message does not describe an error.
    """
    names = validate(dict[str, str], described)
    if names.keys() != {"error", "message"} or len(names["message"]) > MAX_MESSAGE_CHARACTERS:
        raise MalformedMessageError("the description of an error is malformed")
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
    # A tuple, because pydantic accepts no configuration for a dataclass by itself.
    return TypeAdapter(tuple[kind], config=CONFIG)


@functools.cache
def _parameters(function: Callable[..., Any]) -> list[tuple[Any, bool]]:
    """Returns the type of each parameter, and whether it is required."""
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return [
        (hints[parameter.name], parameter.default is inspect.Parameter.empty)
        for parameter in parameters
    ]
