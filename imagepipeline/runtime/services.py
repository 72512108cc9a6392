"""The services of the stack: their commands, environments, configuration files and health checks.

Used by the supervisor, and by `imagepipeline service`, which Docker Compose runs. Each service
writes its own `dagster.yaml` and `workspace.yaml` when it starts, from the packaged files and the
settings, so there are no configuration files to mount or to keep in sync.
"""

import json
import secrets
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from imagepipeline.errors import RedisClusterError, StackError
from imagepipeline.homes import explain_os_errors, make_home, make_socket_folder
from imagepipeline.settings import BUCKET_SECRETS, NOTIFIERS, SECRETS, Settings, is_secret
from imagepipeline.stores import broker
from imagepipeline.stores.uploads import UploadQueue

NAMES = ("code-server", "worker", "daemon", "webserver")
# We always set these, because Celery prefers them to all other settings, and the environment may
# contain another project's values.
CELERY_URLS = ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND")
# Every service needs these to open the Dagster instance.
INSTANCE_SECRETS = {"DAGSTER_DATABASE_URL", "IMAGEPIPELINE_BROKER_URL", *CELERY_URLS}
# The secrets of each process we start. It gets no other variable that looks like a secret. Only
# the worker makes paid calls.
SECRETS_OF = {
    "code-server": {"DATABASE_URL", "REDIS_URL", *NOTIFIERS} | INSTANCE_SECRETS,
    "worker": (SECRETS - NOTIFIERS) | INSTANCE_SECRETS,
    "daemon": INSTANCE_SECRETS,
    "webserver": INSTANCE_SECRETS,
    "migration": {"DATABASE_URL"} | INSTANCE_SECRETS,
    "examination": INSTANCE_SECRETS,
    "resident": BUCKET_SECRETS,  # a worker starts it
    "pruning": {"DATABASE_URL", *NOTIFIERS} | INSTANCE_SECRETS,
    "restoration": {"DATABASE_URL"} | INSTANCE_SECRETS,
    "erasure": {"DATABASE_URL", "REDIS_URL"} | BUCKET_SECRETS | INSTANCE_SECRETS,
}
DEFAULT_WEBSERVER_PORT = 3000
# Each sensor's tick takes one. The default, four and one for each processor, would leave none.
CODE_SERVER_THREADS = "12"
GRPC_SECONDS = 5
# An overloaded machine takes half a minute to start the process that describes it.
ANSWER_SECONDS, WORK_SECONDS = 3, 40
REDIS_SECONDS = 15
HEARTBEAT_TOLERANCE_SECONDS = 120
MIGRATION_COMMAND = [sys.executable, "-m", "imagepipeline.instance.migration"]


def check_redis(settings: Settings) -> None:
    """Checks that Redis is not a cluster; accepts a Redis that does not answer yet.

    Raises:
        RedisClusterError: Redis runs as a cluster.
    """
    with closing(UploadQueue(settings.redis_url, settings.queue_prefix)) as queue:
        try:
            queue.count()
        except RedisClusterError:
            raise
        except StackError:
            return


def build_command(settings: Settings, name: str) -> list[str]:
    """Returns the command line of a service."""
    workspace = ["-w", str(_dagster_home(settings) / "workspace.yaml")]
    port = str(settings.webserver_port or DEFAULT_WEBSERVER_PORT)
    modules = {
        "code-server": [
            *("dagster", "api", "grpc", "--socket", _quote_for_grpc(settings.code_address)),
            *("--max-workers", CODE_SERVER_THREADS, "-m", settings.definitions),
            "--empty-working-directory",  # otherwise Dagster imports from the current folder
        ],
        "worker": ["imagepipeline.runtime.worker"],
        "daemon": ["imagepipeline.runtime.daemon", "run", "--log-level", "warning", *workspace],
        "webserver": [
            "imagepipeline.runtime.webserver",
            "-h",
            settings.webserver_host,
            "-p",
            port,
            *workspace,
        ],
    }
    return [sys.executable, "-m", *modules[name]]


def prepare(settings: Settings) -> None:
    """Creates the home and writes Dagster's configuration files into it.

    Raises:
        StackError: The home cannot be written to, or other users have access to it or its sockets
            (see `homes`).
    """
    make_home(settings)
    make_socket_folder(settings)
    home = _dagster_home(settings)
    with explain_os_errors(settings.home):
        home.mkdir(exist_ok=True, mode=0o700)
        _write(
            home / "dagster.yaml", yaml.safe_dump(_build_dagster_yaml(settings), sort_keys=False)
        )
        _write(home / "workspace.yaml", yaml.safe_dump(_build_workspace_yaml(settings)))


def build_environment(settings: Settings, name: str) -> dict[str, str]:
    """Returns the environment of a process in SECRETS_OF, with only the secrets it needs."""
    environment = settings.build_environment(
        DAGSTER_HOME=str(_dagster_home(settings)),
        IMAGEPIPELINE_CODE_SOCKET=str(settings.code_address),
        DAGSTER_DAEMON_HEARTBEAT_TOLERANCE=str(HEARTBEAT_TOLERANCE_SECONDS),
        PYTHONSAFEPATH="1",  # otherwise `python -m` imports what lies in the current folder
        OPENBLAS_NUM_THREADS="1",  # five runs share the machine
        # When two machines compact the index at once, one fails and logs a harmless warning.
        LANCEDB_LOG="warn,lance::dataset::optimize=error",
        # Services without the API keys cannot find out whether the models are remote.
        IMAGEPIPELINE_VISION="remote" if settings.has_remote_vision else "local",
        IMAGEPIPELINE_EMBEDDING="remote" if settings.has_remote_embedder else "local",
        IMAGEPIPELINE_BROKER_URL=settings.broker_url,
        **dict.fromkeys(CELERY_URLS, broker.build_url(settings.broker_url)),
    )
    if settings.dagster_database_url:
        environment["DAGSTER_DATABASE_URL"] = settings.dagster_database_url.get_secret_value()
    return {
        variable: value
        for variable, value in environment.items()
        if variable in SECRETS_OF[name] or not is_secret(variable)
    }


def migrate(settings: Settings, is_taken_over: bool = False) -> None:
    """Creates or updates the tables of the catalogue and of Dagster.

    If another process is migrating, waits for it first. `is_taken_over` rebinds a catalogue that
    belongs to another Dagster instance to this one.

    Raises:
        StackError: The home cannot be written to, or a database does not answer or refuses. The
            message ends with the last line that the migration printed.
    """
    arguments = ["--take-over"] * is_taken_over
    _run_module(settings, "migration", arguments, "the tables could not be created or updated")


def check_catalogue(settings: Settings) -> None:
    """Checks that the catalogue answers and belongs to this Dagster instance.

    Raises:
        StackError: The catalogue belongs to another Dagster instance, or does not answer.
    """
    _run_module(settings, "migration", ["--check"], "the catalogue cannot be used")


def is_healthy(settings: Settings, name: str) -> bool:
    """Returns whether a service answers, or for the daemon, whether its heartbeats are recent."""
    if name == "code-server":
        return answers_grpc(settings.code_address)
    if name == "webserver":
        return answers_http(build_webserver_url(settings) + "/server_info")
    if name == "worker":
        try:
            return bool(ask_workers(settings, "ping", names=[settings.worker_name]))
        except StackError:
            return False
    prepare(settings)
    command = [sys.executable, "-m", "dagster._daemon", "liveness-check"]
    return (
        subprocess.run(
            command,
            env=build_environment(settings, "examination"),
            capture_output=True,
            check=False,
        ).returncode
        == 0
    )


def examine_daemon(settings: Settings) -> dict[str, dict[str, str]]:
    """Returns the problems of the daemon's parts and of the sensors (see `runtime.examination`).

    Raises:
        StackError: Dagster's database cannot be read.
    """
    prepare(settings)
    command = [sys.executable, "-m", "imagepipeline.runtime.examination"]
    environment = build_environment(settings, "examination")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last_line = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise StackError(f"Dagster's database cannot be read: {last_line.partition(':')[0]:.100}")
    problems: dict[str, dict[str, str]] = json.loads(result.stdout.splitlines()[-1])
    return problems


def erase(settings: Settings, image_ids: Sequence[str], is_dry_run: bool) -> list[dict[str, Any]]:
    """Erases images and returns a receipt for each, see `erasing.Receipt`.

    Raises:
        StackError: One could not be erased. The message ends with the last line that was printed.
    """
    arguments = ["--dry-run"] * is_dry_run + list(image_ids)
    shown = _run_module(settings, "erasure", arguments, "not everything was erased")
    receipts: list[dict[str, Any]] = json.loads(shown)
    return receipts


def prune(settings: Settings, is_dry_run: bool) -> dict[str, Any]:
    """Prunes what is old and returns what that was, see `defs.retention.Pruned`.

    Raises:
        StackError: Not all could be pruned. The message ends with the last line that was printed.
    """
    arguments = ["--dry-run"] * is_dry_run
    shown = _run_module(settings, "pruning", arguments, "not everything was pruned")
    pruned: dict[str, Any] = json.loads(shown)
    return pruned


def restore(settings: Settings, image_ids: Sequence[str], is_dry_run: bool) -> list[dict[str, Any]]:
    """Brings images back to Dagster and returns what became of each.

    Raises:
        StackError: One could not be restored. The message ends with the last line printed.
    """
    arguments = ["--dry-run"] * is_dry_run + list(image_ids)
    shown = _run_module(settings, "restoration", arguments, "not every image was restored")
    rows: list[dict[str, Any]] = json.loads(shown)
    return rows


def _run_module(settings: Settings, name: str, arguments: Sequence[str], failure: str) -> str:
    """Runs one of the commands in `instance/`, and returns the last line that it printed."""
    prepare(settings)
    command = [sys.executable, "-m", f"imagepipeline.instance.{name}", *arguments]
    environment = build_environment(settings, name)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last_line = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise StackError(f"{failure}: {last_line:.500}")
    return (result.stdout.splitlines() or [""])[-1]


def answers_socket(path: Path) -> bool:
    """Returns whether a process listens on the Unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def answers_grpc(path: Path) -> bool:
    """Returns whether the code server at the socket reports that it serves.

    Unlike `answers_socket`, this detects a server that hangs.
    """
    import grpc  # type: ignore[import-untyped]  # imported here, because few commands need it
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(f"unix:{_quote_for_grpc(path)}") as channel:
        request = health_pb2.HealthCheckRequest(service="DagsterApi")
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=GRPC_SECONDS)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def list_workers(settings: Settings) -> list[str]:
    """Returns the names of all workers, on all machines, that answer Celery's ping.

    Raises:
        StackError: The workers' Redis does not answer.
    """
    return sorted(ask_workers(settings, "ping"))


def ask_workers(
    settings: Settings,
    command: str,
    arguments: Mapping[str, Any] | None = None,
    names: Sequence[str] = (),
    patience_seconds: float = ANSWER_SECONDS,
) -> dict[str, Any]:
    """Sends a remote-control command to the named workers, or to all, and returns their answers.

    Returns as soon as all named workers have answered, or after `patience_seconds`.

    Returns:
        The answers, by worker name.

    Raises:
        StackError: The workers' Redis does not answer.
    """
    from celery import Celery
    from kombu.exceptions import OperationalError

    url = broker.build_url(settings.broker_url)
    answer_seconds = max(patience_seconds, REDIS_SECONDS)
    config = broker.build_config(settings.queue_prefix, answer_seconds)
    app = Celery(broker=url, config_source=config)
    destination: dict[str, Any] = {"destination": names, "limit": len(names)} if names else {}
    with app.connection_for_write() as connection:
        try:
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0.1)
            answers = app.control.broadcast(
                command,
                dict(arguments or {}),
                connection=connection,
                reply=True,
                timeout=patience_seconds,
                **destination,
            )
        except (
            OperationalError,
            *connection.connection_errors,
            *connection.channel_errors,
        ) as error:
            raise StackError(
                f"the workers' Redis does not answer ({type(error).__name__})"
            ) from None
    return {worker: value for answer in answers for worker, value in answer.items()}


def answers_http(url: str) -> bool:
    """Returns whether the URL answers with status 200, without using a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def build_webserver_url(settings: Settings) -> str:
    """Returns the URL at which this machine reaches the webserver."""
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
    host = loopback.get(settings.webserver_host, settings.webserver_host)
    port = settings.webserver_port or DEFAULT_WEBSERVER_PORT
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _write(path: Path, text: str) -> None:
    """Writes a file atomically, because another service of this home may be reading it."""
    part = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    part.write_text(text)
    part.replace(path)


def _dagster_home(settings: Settings) -> Path:
    return settings.home / "dagster"


def _build_dagster_yaml(settings: Settings) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(_read_packaged("dagster.yaml"))
    config["concurrency"]["runs"]["max_concurrent_runs"] = settings.max_runs
    if settings.dagster_database_url:
        storage: dict[str, Any] = {
            "module": "imagepipeline.instance.postgres_storage",
            "class": "PooledPostgresStorage",
            "config": {"postgres_url": {"env": "DAGSTER_DATABASE_URL"}},
        }
    else:
        storage = {
            "module": "imagepipeline.instance.sqlite_storage",
            "class": "PooledSqliteStorage",
            "config": {"base_dir": str(_dagster_home(settings) / "storage")},
        }
    launcher = {
        "module": "imagepipeline.runtime.launcher",
        "class": "RunLauncher",
        "config": {
            "broker": {"env": CELERY_URLS[0]},
            "backend": {"env": CELERY_URLS[1]},
            "config_source": broker.build_config(settings.queue_prefix),
        },
    }
    return {**config, "storage": {"custom": storage}, "run_launcher": launcher}


def _build_workspace_yaml(settings: Settings) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(_read_packaged("workspace.yaml"))
    config["load_from"][0]["grpc_server"]["socket"] = _quote_for_grpc(settings.code_address)
    return config


def _quote_for_grpc(path: Path) -> str:
    """Escapes a socket's path for gRPC, which reads it as part of a URI."""
    return quote(str(path))


def _read_packaged(name: str) -> str:
    return files("imagepipeline.runtime").joinpath(name).read_text()
