"""Simulates two machines: workers with their own homes and host names, and a network that fails.

Both run on this machine. UTS namespaces give them host names, a relay in this process is the
network between a machine and the shared servers, and a machine consists of the processes that its
services have started.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dagster as dg
import sqlalchemy as sa
import yaml
from PIL import Image

from imagepipeline.defs.attempts import MACHINE_TAG
from imagepipeline.runtime import services
from imagepipeline.settings import Settings
from imagepipeline.storage import open_storage
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline.stores.vectors import EmbeddingIndex
from imagepipeline_tests.conftest import postgres_database, redis_server
from imagepipeline_tests.end_to_end.processes import list_tree

SLOTS, MAX_RUNS = 3, 4  # only both machines together reach MAX_RUNS
NAMESPACE = (
    ["unshare", "--uts"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--uts"]
)


def can_set_host_names() -> bool:
    """Returns whether this system lets us give processes their own host name."""
    command = [*NAMESPACE, "hostname", "alpha"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Provider:
    """Both paid APIs; counts the calls per picture, and those at the same time.

    While it is held, it receives requests but does not answer them. While `refuses` is true, it
    answers that the key is wrong, and counts the calls in `refused`.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.at_once = self.peak = 0
        self.refuses = False
        self.refused = 0
        self._is_answering = threading.Event()
        self.release()
        provider = self
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                asked = self.rfile.read(int(self.headers["Content-Length"]))
                if provider.refuses:
                    with lock:
                        provider.refused += 1
                    self.send(401, {"error": {"message": "wrong", "code": "invalid_api_key"}})
                    return
                is_chat = self.path.endswith("/chat/completions")
                if is_chat:
                    with lock:
                        key = hashlib.sha256(asked).hexdigest()
                        provider.calls[key] += 1
                        provider.at_once += 1
                        provider.peak = max(provider.peak, provider.at_once)
                    provider._is_answering.wait()
                    with lock:
                        provider.at_once -= 1
                self.send(200, _describe(key) if is_chat else EMBEDDED)

            def send(self, status: int, said: dict[str, Any]) -> None:
                answer = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                with contextlib.suppress(OSError):  # the run was killed
                    self.wfile.write(answer)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def hold(self) -> None:
        """Stops answering."""
        self._is_answering.clear()

    def release(self) -> None:
        """Answers all waiting and future requests."""
        self._is_answering.set()

    def close(self) -> None:
        """Stops the server."""
        self.release()
        self._server.shutdown()
        self._server.server_close()


def _describe(key: str) -> dict[str, Any]:
    said = {
        "description": f"A picture {key}",
        "tags": ["picture"],
        "category": "abstract",
        "dominantColors": ["#aabbcc"],
        "mood": "calm",
    }
    message = {"role": "assistant", "content": json.dumps(said), "refusal": None}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o-mini",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 800, "completion_tokens": 60, "total_tokens": 860},
    }


EMBEDDED = {
    "object": "list",
    "model": "m",
    "data": [{"object": "embedding", "index": 0, "embedding": [1.0, *[0.5] * 15]}],
    "usage": {"prompt_tokens": 5, "total_tokens": 5},
}


class Link:
    """A local port that relays to a server's Unix socket or port until the link is cut.

    While the link is cut, nothing is relayed or refused, as if packets were dropped; data in
    transit arrives later.
    """

    def __init__(self, target: Path | tuple[str, int]) -> None:
        self._target = target
        self._is_whole = threading.Event()
        self._is_whole.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Cuts the link."""
        self._is_whole.clear()

    def mend(self) -> None:
        """Restores the link."""
        self._is_whole.set()

    def close(self) -> None:
        """Closes the port."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        self._is_whole.wait()
        is_local = isinstance(self._target, Path)
        with (
            contextlib.suppress(OSError),
            client,
            socket.socket(socket.AF_UNIX if is_local else socket.AF_INET) as server,
            selectors.DefaultSelector() as selector,
        ):
            server.connect(str(self._target) if is_local else self._target)
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while True:
                for key, _ in selector.select():
                    self._is_whole.wait()
                    data = key.fileobj.recv(65536)
                    if not data:
                        return
                    key.data.sendall(data)


class Machine:
    """A home, a host name and the services started there."""

    def __init__(self, folder: Path, host: str, settings: Mapping[str, str]) -> None:
        self.host = host
        self.home = folder / host
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "IMAGEPIPELINE_HOME": str(self.home),
            **settings,
        }
        self.settings = Settings.load(self.environment)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *arguments: str, code: int = 0) -> str:
        """Runs one of our commands on the machine; returns its output."""
        command = [sys.executable, "-m", "imagepipeline.cli", *arguments]
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == code, result.stdout + result.stderr
        return result.stdout

    def start(self, name: str) -> None:
        """Starts a service."""
        # The service ends with us, however we end.
        named = [
            *NAMESPACE,
            "sh",
            "-c",
            'hostname "$0" && exec setpriv --pdeathsig KILL "$@"',
            self.host,
        ]
        self.home.mkdir(exist_ok=True, mode=0o700)
        with open(self.home / f"{name}.log", "ab") as log:
            self._running[name] = subprocess.Popen(
                [*named, sys.executable, "-m", "imagepipeline.cli", "service", name],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def signal_all(self, number: int) -> None:
        """Sends a signal to all processes of the machine."""
        tree = [pid for process in self._running.values() for pid in list_tree(process.pid)]
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def freeze(self) -> None:
        """Stops all processes until `thaw`."""
        self.signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Continues all processes."""
        self.signal_all(signal.SIGCONT)

    def kill(self) -> None:
        """Kills all processes at once, as a power failure would."""
        self.freeze()
        self.signal_all(signal.SIGKILL)
        for process in self._running.values():
            process.wait()
        self._running.clear()

    def read_log(self) -> str:
        """Returns the output of the services."""
        return "".join(path.read_text(errors="replace") for path in self.home.glob("*.log"))


class Pair:
    """Two machines with shared servers.

    The first runs all services that are needed once; the second runs a worker behind links.
    """

    def __init__(
        self,
        folder: Path,
        root: str,
        postgres_url: str,
        redis_socket: Path,
        urls: tuple[str, str],
        provider: Provider,
        settings: Mapping[str, str],
    ) -> None:
        self.provider = provider
        self.image_ids: list[str] = []
        self.catalogue = Catalogue(urls[0])
        self.queue = UploadQueue(f"unix://{redis_socket}?db=0")
        self.files = open_storage(root)
        self.index = EmbeddingIndex(f"{root}/lancedb")
        self._dagster_url = urls[1]
        self._folder = folder
        postgres_folder = sa.make_url(postgres_url).query["host"]
        self._links = [Link(redis_socket), Link(Path(str(postgres_folder), ".s.PGSQL.5432"))]
        redis_port, postgres_port = (link.port for link in self._links)
        bucket = urlsplit(os.environ.get("AWS_ENDPOINT_URL", "")) if "://" in root else None
        if bucket is not None:
            self._links.append(Link((str(bucket.hostname), int(bucket.port or 80))))
        far = [sa.make_url(url).set(query={}, host="127.0.0.1", port=postgres_port) for url in urls]
        names = ("DATABASE_URL", "DAGSTER_DATABASE_URL")
        shared = {
            "OPENAI_API_KEY": "key",
            "OPENAI_BASE_URL": provider.url,
            "OPENROUTER_API_KEY": "key",
            "OPENROUTER_BASE_URL": provider.url,
            "IMAGEPIPELINE_RATE_LIMIT": "off",
            "IMAGEPIPELINE_MAX_RUNS": str(MAX_RUNS),
            "IMAGEPIPELINE_WORKER_SLOTS": str(SLOTS),
            "IMAGEPIPELINE_STORAGE_ROOT": root,
            "IMAGEPIPELINE_INDEX_ROOT": f"{root}/lancedb",
            **{name: value for name, value in os.environ.items() if name.startswith("AWS_")},
            **settings,
        }
        near = {"REDIS_URL": f"unix://{redis_socket}?db=0", **dict(zip(names, urls, strict=True))}
        behind = [url.render_as_string(hide_password=False) for url in far]
        there = {
            "REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
            **dict(zip(names, behind, strict=True)),
        }
        if bucket is not None:
            there["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{self._links[-1].port}"
        self.alpha, self.beta = (
            Machine(folder, "alpha", shared | near),
            Machine(folder, "beta", shared | there),
        )

    def start(self) -> None:
        """Creates the tables and starts all services; returns when both workers answer."""
        self.alpha.run("migrate")
        for name in ("code-server", "worker", "daemon"):
            self.alpha.start(name)
        self.beta.start("worker")
        self.wait_for_workers({"alpha", "beta"})

    def wait_for_workers(self, hosts: set[str]) -> None:
        """Waits until workers on exactly these hosts answer."""

        def list_hosts() -> set[str]:
            return {name.rpartition("@")[2] for name in services.list_workers(self.alpha.settings)}

        self.wait_until(lambda: list_hosts() == hosts, 150)

    def push(self, name: str, count: int) -> list[str]:
        """Pushes new images with different pictures; returns their IDs."""
        image_ids = [f"{name}{number}" for number in range(count)]
        for image_id in image_ids:
            buffer = io.BytesIO()
            pixels = random.Random(image_id).randbytes(48)
            Image.frombytes("RGB", (4, 4), pixels).resize((320, 240)).save(buffer, "JPEG")
            self.files.put_original(image_id, buffer.getvalue(), "jpg")
            self.queue.enqueue(image_id)
        self.image_ids += image_ids
        return image_ids

    def count(self) -> dict[str, int]:
        """Returns the number of images by status."""
        return {str(status): number for status, number in self.catalogue.count().items()}

    def list_pauses(self) -> list[str]:
        """Returns the reasons why paid work is paused."""
        ledger = Ledger(self.alpha.settings.database_url)
        return [pause.reason for pause in ledger.list_pauses()]

    def wait_until(self, condition: Callable[[], Any], seconds: float) -> float:
        """Waits until the condition holds; returns the seconds."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                logs = "\n".join(machine.read_log()[-3000:] for machine in (self.alpha, self.beta))
                raise AssertionError(f"not within {seconds} s: {self.count()}\n{logs}")
            time.sleep(0.1)
        return time.monotonic() - began

    def wait_until_completed(self, seconds: float) -> float:
        """Waits until all pushed images are completed; returns the seconds."""
        return self.wait_until(lambda: self.count()["completed"] == len(self.image_ids), seconds)

    def stand_still(self, seconds: float) -> None:
        """Waits while a fault lasts."""
        time.sleep(seconds)

    def list_runs(self) -> list[dg.DagsterRun]:
        """Returns all runs, newest first."""
        with open_dagster(self._folder, self._dagster_url) as instance:
            return list(instance.get_runs())

    def list_unfinished_on(self, host: str) -> list[dg.DagsterRun]:
        """Returns the runs that a machine executes."""
        return [
            run
            for run in self.list_runs()
            if run.tags.get(MACHINE_TAG) == host and not run.is_finished
        ]

    def check(self) -> None:
        """Checks that each image was completed once and has one index row with its fence."""
        for image_id in self.image_ids:
            row = self.catalogue.get(image_id)
            assert row is not None
            assert [event["event"] for event in row["history"]].count("completed") == 1, row[
                "history"
            ]
            indexed = self.index.get(image_id, row["made_by"]["embedding"]["version"])
            assert indexed is not None
            assert indexed["fence"] == row["fence"]
            assert len(row["variants"]) == 6
            for variant in row["variants"]:
                assert len(self.files.read(variant["path"])) == variant["size"]
        assert self.index.count_rows() == len(self.image_ids)

    def cut_off(self) -> None:
        """Cuts the second machine off from Redis, Postgres and the bucket."""
        for link in self._links:
            link.cut()

    def mend(self) -> None:
        """Reconnects the second machine."""
        for link in self._links:
            link.mend()

    def stop(self) -> None:
        """Stops all services and servers."""
        self.mend()
        for machine in (self.alpha, self.beta):
            machine.kill()
        for link in self._links:
            link.close()
        self.catalogue.close()
        self.queue.close()


def open_dagster(folder: Path, url: str) -> dg.DagsterInstance:
    """Opens the Dagster instance in the Postgres database at that URL."""
    folder = folder / "dagster"
    folder.mkdir(exist_ok=True)
    storage = {
        "module": "imagepipeline.instance.postgres_storage",
        "class": "PooledPostgresStorage",
        "config": {"postgres_url": url},
    }
    (folder / "dagster.yaml").write_text(
        yaml.safe_dump({"telemetry": {"enabled": False}, "storage": {"custom": storage}})
    )
    return dg.DagsterInstance.from_config(str(folder))


@contextlib.contextmanager
def open_pair(postgres_url: str, root: str, **settings: str) -> Iterator[Pair]:
    """Starts two machines with files and index below `root`, and with further settings.

    If `root` is in a bucket, our environment must have its keys and address.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ip", dir="/tmp")))
        redis_url = stack.enter_context(redis_server())
        urls = (
            stack.enter_context(postgres_database(postgres_url)),
            stack.enter_context(postgres_database(postgres_url)),
        )
        provider = stack.enter_context(closing(Provider()))
        redis_socket = Path(urlsplit(redis_url).path)
        pair = Pair(folder, root, postgres_url, redis_socket, urls, provider, settings)
        stack.callback(pair.stop)
        pair.start()
        yield pair
