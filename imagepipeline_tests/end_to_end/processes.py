"""Which process is which, in a stack that runs."""

import os
import socket
from pathlib import Path


def find_service(home: Path, name: str) -> int:
    """The process of a service of `imagepipeline up`: the leader of its session, whose output goes to its log."""
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
    """The processes a process has started that have the word in their name or command line, oldest first."""
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
    """A process and all that it and they have started, parents first."""
    tree = [root]
    for pid in tree:
        tree += find_children(pid, b"")
    return tree


def find_process(home: Path, word: bytes) -> int:
    """A process of that home with the word in its name or command line."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            names = (path / "comm").read_bytes() + (path / "cmdline").read_bytes()
            if str(home).encode() in (path / "environ").read_bytes() and word in names:
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"no process of {home} is called {word!r}")


def find_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", 0))
        return int(candidate.getsockname()[1])
