"""Durability: what is on a disk for good, also if the power fails."""

import os
from pathlib import Path


def sync(path: Path | str) -> None:
    """Makes a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
