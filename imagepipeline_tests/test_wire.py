"""Messages arrive unchanged or are refused, and waiting for one ends at its deadline."""

import pickle
import socket
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest

from imagepipeline.errors import StaleClaimError
from imagepipeline.models import Embedding, ImageMetadata, VisionAnswer
from imagepipeline.wire import (
    HEADER,
    MalformedMessageError,
    TimedStream,
    describe_error,
    read_message,
    restore_error,
    validate,
    write_message,
)


@dataclass(frozen=True)
class Part:
    name: str
    content: bytes = b""
    numbers: tuple[int, ...] = ()
    flag: bool = False


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield TimedStream(ours, 5), theirs


def send_and_read(value, pair):
    stream, theirs = pair
    threading.Thread(target=write_message, args=(TimedStream(theirs, 5), value)).start()
    return read_message(stream, 10_000_000)


METADATA = ImageMetadata(
    description="A cat.", tags=["cat"], category="animal", dominant_colors=[], mood="calm"
)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (list[Part], [Part("a", b"1"), Part("b", b"\0" * 3_000_000, (1, 2), True)]),
        (tuple[Part, dict[str, bytes]], (Part("a"), {"x": b"y"})),
        (Embedding, Embedding("a\nb", (0.1, -1e-9), "v")),
        (VisionAnswer, VisionAnswer(METADATA)),
        (None, None),
    ],
)
def test_a_message_arrives_unchanged(pair, kind, value):
    assert validate(kind, send_and_read(value, pair)) == value


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, float("nan"), float("inf"), np.float32(1), "x" * 2_000_000]
)
def test_unsupported_or_oversized_values_are_not_sent(pair, value):
    with pytest.raises((TypeError, ValueError)):
        write_message(pair[0], [value])


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, "x"),
        (int, 1.5),
        (str, 1),
        (Part, {"name": "a", "more": 1}),
        (Part, {}),
        (Part, {"name": "x" * 200_000}),
        (Part, [1]),
        (None, 1),
        (float, float("nan")),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(kind, value):
    with pytest.raises(MalformedMessageError):
        validate(kind, value)


def test_a_message_that_trickles_in_times_out(pair):
    stream, theirs = pair
    is_over = threading.Event()

    def dribble():
        for byte in HEADER.pack(1000, 0) + b" " * 1000:
            if is_over.wait(0.02):
                return
            theirs.send(bytes([byte]))

    thread = threading.Thread(target=dribble)
    thread.start()
    started = time.monotonic()
    stream.allow(0.3)
    with pytest.raises(TimeoutError):
        read_message(stream, 100)
    assert time.monotonic() - started < 2
    is_over.set()
    thread.join()


def test_sending_to_a_peer_that_reads_nothing_times_out(pair):
    stream, _ = pair
    stream.allow(0.3)
    with pytest.raises(TimeoutError):
        write_message(stream, b"x" * 10_000_000)


def test_a_pickle_is_refused(pair):
    stream, theirs = pair
    data = pickle.dumps([1, 2])
    theirs.send(HEADER.pack(len(data), 0) + data)
    with pytest.raises(MalformedMessageError):
        read_message(stream, 100)


def test_an_error_of_a_known_type_is_restored():
    described = describe_error(StaleClaimError("too late"))
    assert repr(restore_error(described, [StaleClaimError])) == "StaleClaimError('too late')"
    assert repr(restore_error(described, [])) == "RuntimeError('StaleClaimError: too late')"
