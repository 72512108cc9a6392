"""Finds the processes of a running stack."""

import os
import socket
from pathlib import Path


def find_service(home: Path, name: str) -> int:
    """Returns the process ID of a service: the session leader whose output goes to its log."""
    log = str(home / "logs" / f"{name}.log")
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (
                os.getsid(int(path.name)) == int(path.name)
                and os.readlink(path / "fd" / "1") == log
            ):
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"no {name} runs in {home}")


def find_children(parent: int, word: bytes) -> list[int]:
    """Returns children with a word in their name or command line, oldest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            names = (path / "comm").read_bytes() + (path / "cmdline").read_bytes()
            if is_child and word in names:
                found.append(int(path.name))
        except OSError:
            continue
    return sorted(found)


def list_tree(root: int) -> list[int]:
    """Returns a process and all its descendants, parents first."""
    tree = [root]
    for pid in tree:
        tree += find_children(pid, b"")
    return tree


def find_process(home: Path, word: bytes) -> int:
    """Returns a process of a home with a word in its name or command line."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            names = (path / "comm").read_bytes() + (path / "cmdline").read_bytes()
            if str(home).encode() in (path / "environ").read_bytes() and word in names:
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"no process of {home} has {word!r} in its name or command line")


def find_port() -> int:
    """Returns a free port."""
    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", 0))
        return int(candidate.getsockname()[1])
