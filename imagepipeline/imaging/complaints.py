"""What C libraries print on standard error: libtiff reports damage there alone, and goes on.

A sandbox can open nothing, so its standard error is a pipe from the start.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK_BYTES = 65_536
_readers: list[int] = []  # the other end of standard error, if that is our pipe for good


def redirect() -> None:
    """Makes standard error a pipe that this process itself reads, until it ends."""
    _readers.append(_open())


@contextmanager
def capture() -> Iterator[list[str]]:
    """Collects the lines printed in the block; the list is filled when it ends."""
    lines: list[str] = []
    if _readers:
        _read(_readers[0])  # what was printed before
        yield lines
        lines += _read(_readers[0])
        return
    saved = os.dup(2)
    reader = _open()
    try:
        yield lines
    finally:
        lines += _read(reader)
        os.dup2(saved, 2)
        os.close(saved)
        os.close(reader)


def _open() -> int:
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    for one in (reader, 2):  # a full pipe takes no more, and an empty one is no reason to wait
        os.set_blocking(one, False)
    return reader


def _read(reader: int) -> list[str]:
    content = b""
    with suppress(BlockingIOError):
        while chunk := os.read(reader, CHUNK_BYTES):
            content += chunk
    return content.decode(errors="replace").splitlines()
