"""The services of the stack, and what each is started with: by the supervisor, by compose, by hand.

Each has its own copy of `dagster.yaml` and `workspace.yaml`, written from the shipped ones and the settings when it
starts, so that there is nothing to mount and nothing to keep in step.
"""

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.resources import files
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import yaml

from imagepipeline.errors import StackError
from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue

# What the services import, and may share when they are forked from one process that has.
SHARED_MODULES = ("dagster._cli", "dagster._daemon.cli", "dagster_webserver.app", "dagster_webserver.cli")
NAMES = ("code-server", "daemon", "webserver")
DEFAULT_WEBSERVER_PORT = 3000
MIGRATION_COMMAND = [sys.executable, "-m", "imagepipeline.runtime.migration"]


def build_command(settings: Settings, name: str) -> list[str]:
    """The command line of a service."""
    workspace = ["-w", str(_dagster_home(settings) / "workspace.yaml")]
    port = str(settings.webserver_port or DEFAULT_WEBSERVER_PORT)
    modules = {
        "code-server": [
            *("imagepipeline.runtime.code_server", "--socket", str(settings.code_address)),
            *("-m", "imagepipeline.definitions"),
        ],
        "daemon": ["imagepipeline.runtime.daemon", "run", *workspace],
        "webserver": ["dagster_webserver", "-h", settings.webserver_host, "-p", port, *workspace],
    }
    return [sys.executable, "-m", *modules[name]]


def prepare(settings: Settings) -> dict[str, str]:
    """Writes Dagster's files, and gives the environment of a service.

    Raises:
        StackError: the folder for the sockets belongs to another user.
    """
    settings.socket_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if settings.socket_folder.stat().st_uid != os.getuid():
        raise StackError(f"{settings.socket_folder} belongs to another user: remove it, or set IMAGEPIPELINE_HOME")
    home = _dagster_home(settings)
    home.mkdir(parents=True, exist_ok=True)
    (home / "dagster.yaml").write_text(yaml.safe_dump(_build_dagster_yaml(settings), sort_keys=False))
    (home / "workspace.yaml").write_text(_read_shipped("workspace.yaml"))
    environment = settings.build_environment(
        DAGSTER_HOME=str(home),
        IMAGEPIPELINE_CODE_SOCKET=str(settings.code_address),
        DAGSTER_DAEMON_HEARTBEAT_TOLERANCE="120",
        OPENBLAS_NUM_THREADS="1",  # five runs share the machine
    )
    if settings.dagster_database_url:
        environment["DAGSTER_DATABASE_URL"] = settings.dagster_database_url.get_secret_value()
    return environment


def migrate(settings: Settings, is_taken_over: bool = False) -> None:
    """Creates or updates the tables of the catalogue and of Dagster; while another process does, it waits.

    With `is_taken_over` a catalogue that belongs to another Dagster instance is this one's from now on.

    Raises:
        StackError: a database does not answer, or refuses; the message is the last line that was printed.
    """
    try:
        Catalogue(settings.database_url).migrate()
    except sa.exc.DBAPIError as error:
        raise StackError(f"the catalogue's tables could not be made ({type(error.orig).__name__})") from None
    command = MIGRATION_COMMAND + ["--take-over"] * is_taken_over
    result = subprocess.run(command, env=prepare(settings), capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last_line = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise StackError(f"the tables could not be made: {last_line:.500}")


def is_healthy(settings: Settings, name: str) -> bool:
    """Whether a service answers; of the daemon, whether all its parts have given a sign of life of late."""
    if name == "code-server":
        return answers_socket(settings.code_address)
    if name == "webserver":
        return answers_http(f"http://127.0.0.1:{settings.webserver_port or DEFAULT_WEBSERVER_PORT}/server_info")
    command = [sys.executable, "-m", "dagster._daemon", "liveness-check"]
    return subprocess.run(command, env=prepare(settings), capture_output=True, check=False).returncode == 0


def answers_socket(path: Path) -> bool:
    """Whether somebody listens there."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def answers_http(url: str) -> bool:
    """Whether there is a page."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310  (our own http URL)
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _dagster_home(settings: Settings) -> Path:
    return settings.home / "dagster"


def _build_dagster_yaml(settings: Settings) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(_read_shipped("dagster.yaml"))
    config["concurrency"]["runs"]["max_concurrent_runs"] = settings.max_runs
    if settings.dagster_database_url:
        storage: dict[str, Any] = {
            "module": "imagepipeline.runtime.postgres_storage",
            "class": "PooledPostgresStorage",
            "config": {"postgres_url": {"env": "DAGSTER_DATABASE_URL"}},
        }
    else:
        storage = {
            "module": "imagepipeline.runtime.sqlite_storage",
            "class": "PooledSqliteStorage",
            "config": {"base_dir": str(_dagster_home(settings) / "storage")},
        }
    return {**config, "storage": {"custom": storage}}


def _read_shipped(name: str) -> str:
    return files("imagepipeline.runtime").joinpath(name).read_text()
