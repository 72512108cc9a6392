"""A stack for drills to break and examine, with small images and a stand-in for the provider."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import redis
from PIL import Image

from imagepipeline.models import Status
from imagepipeline.runtime import services
from imagepipeline.runtime.processes import read_tail
from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline_tests.conftest import redis_server
from imagepipeline_tests.end_to_end.processes import find_children, find_port, find_service

COMMAND = Path(sys.executable).parent / "imagepipeline"
PATIENCE_SECONDS = 240
EVER, MAX_SHOWN = datetime(2000, 1, 1, tzinfo=UTC), 20
LEVELS = 8  # of red, green and blue, which together encode an image's number
STEP = 256 // LEVELS
RUNS = """{ runsOrError(limit: 1000) { ... on Runs { results {
    runId status tags { key value } eventConnection(limit: 1000) { events {
        ... on RunFailureEvent { eventType message }
        ... on RunCanceledEvent { eventType message } } } } } } }"""
NEWEST = """{ assetOrError(assetKey: { path: ["%s"] }) { ... on Asset {
    assetMaterializations(limit: 1) { metadataEntries { label
        ... on IntMetadataEntry { intValue } } } } } }"""
CANCEL = """mutation { terminateRun(runId: "%s", terminatePolicy: %s) { __typename
    ... on TerminateRunFailure { message } ... on PythonError { message } } }"""
STARTED = """{ runsOrError(filter: { statuses: [STARTED] }) { ... on Runs { results {
    eventConnection(limit: 20) { events { ... on EngineEvent { message } } } } } } }"""
ENDED = ("SUCCESS", "FAILURE", "CANCELED")
LOGS = ("worker", "daemon", "code-server")
# Acceptable ends of a run without a result: its worker reports its death, the reconciler ends it,
# it fails, it is cancelled, or the daemon cannot launch it.
LEGAL_ENDS = re.compile(
    r"The process that executed the run died|Ended by the reconciler|[Ss]teps failed|cancel"
    r"|^This run has been marked as failed from outside the execution context\.$"
)


class Provider:
    """A slow provider with OpenAI's API that records all calls: stage, image and time."""

    def __init__(self, call_seconds: float) -> None:
        self.call_seconds = call_seconds
        self.calls: list[tuple[str, int, datetime]] = []
        provider = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = json.dumps(provider.answer(asked)).encode()
                time.sleep(provider.call_seconds)
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def handle(self) -> None:
                try:
                    super().handle()
                except ConnectionError:  # the caller was killed
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Records a request and returns the answer."""
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        if "input" in asked:
            text = asked["input"] if isinstance(asked["input"], str) else asked["input"][0]
            self.calls.append(
                ("embedding", int(re.search(r"Image number (\d+)", text)[1]), datetime.now(UTC))
            )
            data = [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}]
            return {"object": "list", "model": "m", "data": data, "usage": usage}
        picture = re.search(r"base64,([A-Za-z0-9+/=]+)", json.dumps(asked))[1]
        levels = (
            Image.open(io.BytesIO(base64.b64decode(picture)))
            .convert("RGB")
            .resize((1, 1))
            .getpixel((0, 0))
        )
        red, green, blue = (level // STEP for level in levels)
        number = (red * LEVELS + green) * LEVELS + blue
        self.calls.append(("metadata", number, datetime.now(UTC)))
        said = {
            "description": f"Image number {number}.",
            "tags": ["a"],
            "category": "c",
            "dominantColors": [],
        }
        message = {"role": "assistant", "content": json.dumps({**said, "mood": "calm"})}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": choices,
            "usage": usage,
        }

    def close(self) -> None:
        """Stops the server."""
        self._server.shutdown()
        self._server.server_close()


class Drill:
    """A stack with the environment in `os.environ`, and operations to break and examine it."""

    def __init__(self, home: Path, provider: Provider) -> None:
        self.home = home
        self.provider = provider
        self.settings = Settings.load()
        self.log = (home.parent / "up.log").open("ab")
        self.cancelled = 0
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._pushed = 0

    def start(self) -> None:
        """Starts the stack and waits until it is up."""
        self._processes["up"] = subprocess.Popen(
            [COMMAND, "up", "--json"], stdout=subprocess.PIPE, stderr=self.log
        )
        self.webserver_url = json.loads(self._processes["up"].stdout.readline())["webserver_url"]
        self.catalogue = Catalogue(self.settings.database_url)

    def restart(self, **environment: str) -> None:
        """Stops the stack and starts it with further environment variables."""
        self.stop()
        os.environ.update(environment)
        self.settings = Settings.load()
        self.log = (self.home.parent / "up.log").open("ab")
        self.start()

    def start_services(self) -> None:
        """Starts each service by its command, as Compose does, and waits until all are up."""
        subprocess.run([COMMAND, "migrate"], check=True, stdout=self.log, stderr=self.log)
        for name in services.NAMES:
            self.start_service(name)
        self.webserver_url = services.build_webserver_url(self.settings)
        self.wait_for(lambda: services.answers_http(f"{self.webserver_url}/server_info"))
        self.catalogue = Catalogue(self.settings.database_url)

    def start_service(self, name: str) -> None:
        """Starts one service by its command."""
        self._processes[name] = subprocess.Popen(
            [COMMAND, "service", name], stdout=self.log, stderr=self.log
        )

    def stop_service(self, name: str) -> None:
        """Terminates a service and waits until it has ended."""
        process = self._processes.pop(name)
        process.terminate()
        process.wait(60)

    def stop(self) -> None:
        """Ends everything at once."""
        for process in self._processes.values():
            process.terminate()
        if "up" in self._processes:
            time.sleep(0.3)
            self._processes["up"].terminate()  # the second signal skips draining
        for process in self._processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        self.log.close()

    @property
    def pid(self) -> int:
        """The process ID of the supervisor."""
        return self._processes["up"].pid

    def show_logs(self) -> None:
        """Prints the ends of the logs."""
        for log in (
            self.home.parent / "up.log",
            *(self.home / "logs" / f"{name}.log" for name in LOGS),
        ):
            print(f"--- {log.name}", read_tail(log, 200), sep="\n", flush=True)

    def redis(self) -> redis.Redis:
        """Returns a client of the stack's Redis."""
        return redis.Redis.from_url(self.settings.redis_url, decode_responses=True)

    def push(self, count: int) -> list[str]:
        """Pushes `count` new images, 512 in all; returns their IDs."""
        folder = self.home / "storage" / "original"
        folder.mkdir(parents=True, exist_ok=True)
        image_ids = []
        for number in range(self._pushed, self._pushed + count):
            levels = (number // LEVELS**2, number // LEVELS, number)
            color = tuple(level % LEVELS * STEP + STEP // 2 for level in levels)
            Image.new("RGB", (320, 240), color).save(folder / f"image{number}.png")
            image_ids.append(f"image{number}")
        self._pushed += count
        with closing(self.redis()) as client:
            client.lpush(f"{self.settings.queue_prefix}:wait", *image_ids)
        return image_ids

    @property
    def worker(self) -> int:
        """The process ID of the worker."""
        return self.find("worker")

    def find(self, name: str) -> int:
        """Returns the process ID of a service."""
        return find_service(self.home, name)

    def children(self) -> list[int]:
        """Returns the worker's children that execute runs or wait for one."""
        return find_children(self.worker, b"run\n")

    def busy_children(self) -> list[int]:
        """Returns the children that execute a run, according to the run's events."""
        asked = self.ask(STARTED)["runsOrError"]["results"]
        messages = " ".join(
            event.get("message", "") for run in asked for event in run["eventConnection"]["events"]
        )
        named = {
            int(pid) for pid in re.findall(r"Started process for run \(pid: (\d+)\)", messages)
        }
        return sorted(named.intersection(self.children()))

    def tell(self, number: int, *pids: int) -> None:
        """Sends a signal to processes."""
        for pid in pids:
            os.kill(pid, number)

    def ask(self, query: str) -> dict[str, Any]:
        """Sends a GraphQL query to the webserver; returns the data of its answer."""
        request = urllib.request.Request(
            f"{self.webserver_url}/graphql",
            json.dumps({"query": query}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=60
        ) as answer:
            return json.load(answer)["data"]

    def read_newest(self, asset: str) -> dict[str, int]:
        """Returns the whole numbers of an asset's newest materialization."""
        [newest] = self.ask(NEWEST % asset)["assetOrError"]["assetMaterializations"]
        return {one["label"]: one.get("intValue") for one in newest["metadataEntries"]}

    def runs(self) -> list[dict[str, Any]]:
        """Returns all runs: `id`, `status`, `image`, `end` (why it did not succeed), and tags."""
        found = []
        for run in self.ask(RUNS)["runsOrError"]["results"]:
            tags = {tag["key"]: tag["value"] for tag in run["tags"]}
            ends = [event["message"] for event in run["eventConnection"]["events"] if event]
            image, end = tags.get("dagster/partition"), " ".join(ends)
            found.append(
                {
                    "id": run["runId"],
                    "status": run["status"],
                    "image": image,
                    "end": end,
                    "tags": tags,
                }
            )
        return found

    def run_of(self, image_id: str, *statuses: str) -> str:
        """Waits until an image's run has one of the statuses; returns its ID."""

        def find() -> str | None:
            return next(
                (
                    r["id"]
                    for r in self.runs()
                    if r["image"] == image_id and r["status"] in statuses
                ),
                None,
            )

        return self.wait_for(find)

    def cancel(self, run_id: str, is_forced: bool = False) -> None:
        """Cancels a run like the UI; `is_forced` is its box "Force termination immediately"."""
        policy = "MARK_AS_CANCELED_IMMEDIATELY" if is_forced else "SAFE_TERMINATE"
        answer = self.ask(CANCEL % (run_id, policy))["terminateRun"]
        assert answer["__typename"] == "TerminateRunSuccess", answer

    def wait_for(self, find: Callable[[], Any], patience_seconds: float = PATIENCE_SECONDS) -> Any:
        """Waits until `find` returns a true value; returns it."""
        deadline = time.monotonic() + patience_seconds
        while not (value := find()):
            assert time.monotonic() < deadline, (
                f"not within {patience_seconds} s: {self.describe()}"
            )
            time.sleep(0.05)
        return value

    def describe(self) -> str:
        """Describes the state of the stack, for messages."""
        return json.dumps(
            {
                "counts": self.catalogue.count(),
                "failures": self.catalogue.list_events("failed", EVER, MAX_SHOWN),
                "runs": Counter(f"{run['status']} {run['end']}" for run in self.runs()),
            },
            default=str,
        )

    def count(self, *statuses: str) -> int:
        """Counts the images with one of the statuses."""
        counts = self.catalogue.count()
        return sum(counts[status] for status in statuses)

    def wait_until_working(self, count: int = 2) -> None:
        """Waits until at least `count` images are being processed."""
        self.wait_for(lambda: self.count("processing") >= count)

    def measure_completion(self, since: float) -> float:
        """Waits until all pushed images have ended; returns the seconds since `since`."""
        self.wait_for(lambda: self.count("completed", "failed") == self._pushed)
        return time.monotonic() - since

    def check(self) -> None:
        """Checks that no image was lost, processed or paid twice, and no healthy run failed."""
        # A run ends after its image.
        self.wait_for(lambda: all(run["status"] in ENDED for run in self.runs()))
        counts = self.catalogue.count()
        assert counts["completed"] == self._pushed - self.cancelled
        calls = Counter((asset, number) for asset, number, _ in self.provider.calls)
        for status in (Status.COMPLETED, Status.FAILED):
            for row in self.catalogue.list_ended(status):
                history = self.catalogue.get(row["id"])["history"]
                events = [event["event"] for event in history]
                assert events.count("accepted") == events.count(row["status"]) == 1, events
                assert status != Status.FAILED or row["reason"] == "cancelled", row
                claims = events.count("claimed")
                number = int(row["id"].removeprefix("image"))
                for asset in ("metadata", "embedding"):
                    # A call is repeated only if a run died before it stored the answer.
                    assert calls[asset, number] <= claims, (
                        row["id"],
                        asset,
                        calls[asset, number],
                        events,
                    )
                    made = [event["at"] for event in history if is_made(event, asset)]
                    late = [
                        at
                        for what, whom, at in self.provider.calls
                        if (what, whom) == (asset, number)
                    ]
                    assert not made or max(late) <= made[0], (row["id"], asset, events)
        for run in self.runs():
            assert run["status"] == "SUCCESS" or LEGAL_ENDS.search(run["end"]), run


def is_made(event: dict[str, Any], asset: str) -> bool:
    """Returns whether an event in the history says that an asset's result was stored."""
    return event["event"] == "made" and event["detail"].startswith(f"{asset} by ")


@contextmanager
def drill(
    call_seconds: float = 1.0, has_services: bool = False, **environment: str
) -> Iterator[Drill]:
    """Starts a stack in a new home, with the given environment variables.

    With `has_services`, each service is started by its command and uses an external Redis.
    """
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="ip", dir="/tmp")))
        provider = Provider(call_seconds)
        exits.callback(provider.close)
        kept = dict(os.environ)
        exits.callback(lambda: (os.environ.clear(), os.environ.update(kept)))
        os.environ.update(
            {
                "IMAGEPIPELINE_HOME": str(folder / "home"),
                "IMAGEPIPELINE_WEBSERVER_PORT": str(find_port()),
                "IMAGEPIPELINE_RATE_LIMIT": "off",
                "OPENAI_BASE_URL": provider.url,
                "OPENROUTER_BASE_URL": provider.url,
                **environment,
            }
        )
        if has_services:
            os.environ["REDIS_URL"] = exits.enter_context(redis_server())
        stack = Drill(folder / "home", provider)
        exits.callback(stack.stop)
        if has_services:
            stack.start_services()
        else:
            stack.start()
        yield stack
