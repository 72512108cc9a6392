"""Runs a fresh stack for a benchmark, with a fake provider, and measures its resource usage."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from imagepipeline.models import BULK_PRIORITY, Upload
from imagepipeline.runtime import processes, valkey
from imagepipeline.runtime.supervisor import find_running
from imagepipeline.settings import Settings
from imagepipeline.storage import open_storage
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.uploads import UploadQueue

FOLDER = Path(__file__).parent
TICKS = os.sysconf("SC_CLK_TCK")
COMMAND = Path(sys.executable).parent / "imagepipeline"
SETTLE_SECONDS = 8  # until the index is imported and all processes have finished starting


@dataclass
class Stack:
    """A running stack: its settings, its supervisor's process ID and the UI's URL."""

    settings: Settings
    pid: int
    webserver_url: str

    def push(self, photos: list[Path], is_bulk: bool = False) -> list[str]:
        """Stores originals, and pushes their IDs or puts them into the bulk lane; returns these."""
        files = open_storage(self.settings.storage)
        ids = [f"{photo.stem[:40]}-{time.time_ns()}" for photo in photos]
        for image_id, photo in zip(ids, photos, strict=True):
            files.put_original(image_id, photo.read_bytes(), photo.suffix[1:])
        if is_bulk:
            with closing(Catalogue(self.settings.database_url)) as catalogue:
                catalogue.accept(Upload(image_id, priority=-1000) for image_id in ids)
                for image_id in ids:
                    catalogue.prioritize(image_id, BULK_PRIORITY)
            return ids
        with closing(UploadQueue(self.settings.redis_url, self.settings.queue_prefix)) as queue:
            for image_id in ids:
                queue.enqueue(image_id)
        return ids

    def wait(self, image_ids: list[str], seconds: float = 600) -> dict[str, float]:
        """Waits until all images have completed.

        Returns:
            The seconds from the call until each image was seen to be completed.

        Raises:
            RuntimeError: An image failed, or did not complete within `seconds`.
        """
        started, ended = time.monotonic(), dict[str, float]()
        with closing(Catalogue(self.settings.database_url)) as catalogue:
            while len(ended) < len(image_ids):
                if time.monotonic() - started > seconds:
                    raise RuntimeError(
                        f"{len(image_ids) - len(ended)} images did not end within {seconds} s"
                    )
                states = catalogue.get_states(
                    [image_id for image_id in image_ids if image_id not in ended]
                )
                for image_id, state in states.items():
                    if state.status == "failed":
                        raise RuntimeError(f"{image_id} failed")
                    if state.status == "completed":
                        ended[image_id] = time.monotonic() - started
                time.sleep(0.02 if len(image_ids) == 1 else 0.1)
        return ended

    def measure_cpu_seconds(self) -> dict[str, float]:
        """Returns the CPU seconds so far, by process name, including those of ended children."""
        used: dict[str, float] = {}
        for pid, fields in list_tree(self.pid).items():
            name = name_process(pid)
            used[name] = used.get(name, 0) + sum(int(field) for field in fields[11:15]) / TICKS
        return used

    def measure_memory_bytes(self) -> dict[str, int]:
        """Returns the memory by process name, with shared pages counted once (PSS)."""
        used: Counter[str] = Counter()
        for pid in list_tree(self.pid):
            used[name_process(pid)] += read_pss_bytes(pid)
        return dict(used.most_common())


@contextmanager
def run_stack(environment: Mapping[str, str]) -> Iterator[Stack]:
    """Starts a fresh stack without rate limit; drains and removes it afterwards."""
    home = Path(tempfile.mkdtemp(prefix="ip", dir="/tmp"))
    changes = {"IMAGEPIPELINE_HOME": str(home), "IMAGEPIPELINE_RATE_LIMIT": "off", **environment}
    os.environ.update(changes)
    process = processes.start([str(COMMAND), "up"], home / "up.log", {**os.environ})
    try:
        settings = Settings.load()
        while not (running := find_running(settings)) or not running["webserver_url"]:
            if process.poll() is not None:
                raise RuntimeError((home / "up.log").read_text())
            time.sleep(0.2)
        time.sleep(SETTLE_SECONDS)
        yield Stack(settings, running["pid"], running["webserver_url"])
    finally:
        processes.stop(process, patience_seconds=60)
        shutil.rmtree(home)


@contextmanager
def run_provider(
    chat_seconds: float, embed_seconds: float, port: int = 8098
) -> Iterator[dict[str, str]]:
    """Runs the fake provider; yields the settings that make the stack use it."""
    arguments = ["--port", port, "--chat-latency", chat_seconds, "--embed-latency", embed_seconds]
    process = subprocess.Popen(
        [sys.executable, FOLDER / "fake_ai.py", *map(str, arguments)], stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url + "/stats")
        yield {"OPENAI_BASE_URL": url + "/v1", "OPENROUTER_BASE_URL": url + "/v1"}
    finally:
        process.kill()


def run_peer(
    photos: Path,
    count: int,
    effort: int,
    provider_url: str,
    concurrency: int = 5,
    out: Path | None = None,
) -> dict[str, float]:
    """Runs one burst through the reference worker (BullMQ, sharp); returns its figures."""
    with tempfile.TemporaryDirectory() as folder:
        binary, port = valkey.find_binary(), 6398
        redis = subprocess.Popen(
            [binary, "--port", str(port), "--save", ""], cwd=folder, stdout=subprocess.DEVNULL
        )
        try:
            time.sleep(1)
            arguments = [
                *("--photos", photos, "--n", count, "--effort", effort),
                *("--concurrency", concurrency, "--out", out or Path(folder, "out")),
            ]
            environment = {**os.environ, "REDIS_PORT": str(port), "AI_URL": provider_url}
            worker = ["node", "worker.mjs", *map(str, arguments)]
            done = subprocess.run(
                worker, cwd=FOLDER / "peer", env=environment, capture_output=True, text=True
            )
            figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            return figures
        finally:
            redis.kill()


def list_tree(root: int) -> dict[int, list[str]]:
    """Returns a process and all its descendants.

    The values are the fields of /proc/PID/stat after the process name (proc(5)).
    """
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            found[int(path.name)] = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
    tree, todo = {}, [root]
    while todo:
        pid = todo.pop()
        if pid in found:
            tree[pid] = found[pid]
            todo += [child for child, fields in found.items() if int(fields[1]) == pid]
    return tree


def name_process(pid: int) -> str:
    """Returns the role of a process of the stack, judging by its name and command line."""
    try:
        line = (
            Path(f"/proc/{pid}/comm").read_text()
            + Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        )
    except OSError:
        return "other"
    words = {
        "zygote": "decoders",
        "imagepipeline.resident": "resident",
        "valkey": "redis",
        "run\n": "runs",
        "worker\n": "worker",
        "code-server\n": "code server",
        "daemon\n": "daemon",
        "webserver\n": "webserver",
        "forkserver": "shared",
        "imagepipeline\n": "supervisor",
    }
    return next((name for word, name in words.items() if word in line), "other")


def read_pss_bytes(pid: int) -> int:
    """Returns a process's proportional share of memory (PSS); 0 if the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def describe_machine() -> str:
    """Describes the machine and the versions of the packages that are measured."""
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("dagster", "pillow", "pillow-avif-plugin", "lancedb")
    )
    sharp = json.loads((FOLDER / "peer" / "package.json").read_text())["dependencies"]["sharp"]
    load = os.getloadavg()[0]
    python = platform.python_version()
    return (
        f"{os.cpu_count()} cores, load {load:.1f} before; "
        f"Python {python}, {packages}, sharp {sharp}"
    )


def wait_for(url: str, seconds: float = 60) -> None:
    """Waits until the URL answers; raises OSError if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
