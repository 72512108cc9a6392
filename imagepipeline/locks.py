"""Locks of files between processes of a machine; the system releases them when a process dies."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERVAL_SECONDS = 0.05


def hold_lock(path: Path) -> int | None:
    """Locks a file and returns its descriptor, or None if another process holds the lock.

    The lock lasts until this process and all children that inherit the descriptor have closed it.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


@contextmanager
def trying_lock(path: Path, patience_seconds: float = 0) -> Iterator[bool]:
    """Locks a file for the body; gives whether that was possible in time."""
    deadline = time.monotonic() + patience_seconds
    while (lock := hold_lock(path)) is None and time.monotonic() < deadline:
        time.sleep(INTERVAL_SECONDS)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)
