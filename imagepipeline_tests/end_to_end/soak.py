"""The soak: uploads of all kinds while faults of all kinds hit two machines and their servers.

    python -m imagepipeline_tests.end_to_end.soak                       # ten minutes
    python -m imagepipeline_tests.end_to_end.soak --minutes 118         # 2,000 uploads, 500 faults

Every fault is printed when it is done. In the end the whole history is checked: nothing lost,
nothing twice, nothing wrong, nothing paid twice, nothing left, and nobody helped. The exit code is
1 if something does not hold. The seed draws uploads and faults; which process is hit, and when the
pipeline notices, depends on the machine.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import dagster as dg
import sqlalchemy as sa

from imagepipeline.dagster_records import UNFINISHED
from imagepipeline.errors import ImagePipelineError, PostponedError
from imagepipeline.models import Status
from imagepipeline.runtime import services
from imagepipeline.storage import open_storage
from imagepipeline.stores.catalogue import POISON_RECOVERIES, Catalogue
from imagepipeline.stores.events import EventLog
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline.stores.vectors import EmbeddingIndex
from imagepipeline_tests.conftest import s3_bucket
from imagepipeline_tests.end_to_end import soak_history as history
from imagepipeline_tests.end_to_end.processes import find_port
from imagepipeline_tests.end_to_end.soak_faults import Injector, World, plan_faults
from imagepipeline_tests.end_to_end.soak_machines import (
    Clock,
    Disk,
    Host,
    Keeper,
    Postgres,
    Redis,
)
from imagepipeline_tests.end_to_end.soak_provider import Provider
from imagepipeline_tests.end_to_end.soak_uploads import App
from imagepipeline_tests.end_to_end.two_machines import Link, open_dagster

UPLOADS_PER_MINUTE, FAULTS_PER_MINUTE = 17, 4.3
SLOTS, MAX_RUNS = 3, 4
START_SECONDS, CALM_SECONDS, PATIENCE_SECONDS = 180, 90, 600
PLANNED_SHARE = 1.2  # some planned faults find nothing to break


@dataclass
class Report:
    """What was done, and what did not hold."""

    seed: int
    seconds: float = 0
    uploads: dict[str, int] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    faults_missed: dict[str, int] = field(default_factory=dict)
    provider_faults: dict[str, int] = field(default_factory=dict)
    calls: int = 0
    answers_lost_by: dict[str, int] = field(default_factory=dict)
    answers_repeated_after: dict[str, int] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    temporary_files: int = 0
    restarts: dict[str, int] = field(default_factory=dict)
    calm_seconds: float = 0
    violations: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Whether everything holds."""
        return not any(self.violations.values())

    def describe(self) -> list[str]:
        """The report as lines to read."""
        lines = [
            f"seed {self.seed}: {sum(self.uploads.values())} uploads and "
            f"{sum(self.faults.values())} faults in {self.seconds / 60:.0f} minutes; "
            f"all calm {self.calm_seconds:.0f} s after the last fault"
        ]
        names = ("uploads", "images", "events", "faults", "faults_missed", "provider_faults")
        for name in (*names, "restarts", "answers_lost_by", "answers_repeated_after"):
            counts = ", ".join(f"{key} {count}" for key, count in getattr(self, name).items())
            lines.append(f"{name.replace('_', ' ')}: {counts or 'none'}")
        lines.append(f"calls: {self.calls}")
        lines.append(f"temporary files of killed writers, for `sweep`: {self.temporary_files}")
        for name, found in self.violations.items():
            lines.append(f"{name}: {len(found)}")
            lines += [f"  {one}" for one in found]
        return lines


class Soak:
    """Two machines with their servers, an app, and what is known of them."""

    def __init__(
        self, folder: Path, root: str, seeds: random.Random, world: World, urls: tuple[str, str]
    ) -> None:
        self._world = world
        self._url = urls[0]
        self._catalogue = Catalogue(urls[0])
        self._events = EventLog(urls[0])
        self._queue = UploadQueue(world.redis.url)
        self._files = open_storage(root)
        self._index = EmbeddingIndex(f"{root}/lancedb")
        self._dagster = open_dagster(folder, urls[1])
        self._first = next(iter(world.hosts.values()))
        self._seeds = seeds
        self.app = App(seeds.getrandbits(32), self._files, self._queue, world.provider, self._first)
        self.injector = Injector(world, seeds.getrandbits(32), self._is_unsafe)

    def start(self) -> None:
        """Starts both machines; returns when their workers answer."""
        self._first.run("migrate")
        for host in self._world.hosts.values():
            host.keep()
        deadline = time.monotonic() + START_SECONDS
        while len(services.list_workers(self._first.settings)) < len(self._world.hosts):
            assert time.monotonic() < deadline, f"{START_SECONDS} s without two workers"
            time.sleep(0.5)

    def run(self, seconds: float, uploads: int, faults: int) -> None:
        """Uploads and breaks things for some seconds, then mends everything."""
        most = round(faults * PLANNED_SHARE)
        seed = self._seeds.getrandbits(32)
        planned = plan_faults(seed, most, seconds, [*self._world.hosts], self._can_break)
        app = threading.Thread(target=self.app.run, args=(uploads, seconds * 0.9), daemon=True)
        app.start()
        self.injector.run(planned)
        app.join()
        self._world.provider.is_calm.set()
        self.injector.calm()

    def wait_until_calm(self) -> float:
        """Waits until nothing waits or works; returns the seconds since the last fault ended."""
        ended = max((hit.ended for hit in self.injector.hits), default=time.monotonic())
        while not self._is_calm() and time.monotonic() - ended < PATIENCE_SECONDS:
            time.sleep(0.5)
        return time.monotonic() - ended

    def check(self, report: Report) -> None:
        """Checks the whole history, and writes what was done and what does not hold."""
        world, app = self._world, self.app
        provider = world.provider
        seen = history.gather(
            self._url, app.expected, app.unreadable, provider.calls, self.injector.hits
        )
        paid_twice, repeated = history.find_paid_twice(seen)
        unrecorded, lost = history.find_unrecorded(seen)
        report.answers_repeated_after, report.answers_lost_by = dict(repeated), dict(lost)
        report.uploads = dict(app.counts)
        report.images = self._catalogue.count() | {
            f"failed: {reason}": count for reason, count in self._catalogue.count_failures().items()
        }
        report.faults, report.faults_missed = self.injector.count(), dict(self.injector.missed)
        report.provider_faults = dict(provider.count_faults())
        report.calls = len(provider.calls)
        told = (row["event"] for rows in seen.history.values() for row in rows)
        report.events = dict(Counter(told))
        report.temporary_files = len([*world.disk.folder.rglob(".*.tmp")])
        report.restarts = {host.host: host.restarts for host in world.hosts.values()}
        events = history.read_stream(self._queue)
        hosts = world.hosts.values()
        checks: dict[str, Sequence[Iterable[str]]] = {
            "lost": [app.problems, history.find_lost(seen)],
            "wrong": [history.find_wrong(seen, self._files, self._index)],
            "double": [history.find_doubles(seen)],
            "events": [history.find_wrong_events(seen, events)],
            "paid twice": [paid_twice],
            "ledger": [unrecorded],
            "left": [
                history.find_leftovers(seen, self._queue),
                history.find_stray_files(seen, self._files),
                *(host.list_orphans() for host in hosts),
            ],
        }
        report.violations = {name: _collect(found) for name, found in checks.items()}

    def copy_logs(self, folder: Path) -> None:
        """Copies the machines' logs, to find out why something does not hold."""
        for name, host in self._world.hosts.items():
            for path in (*host.home.glob("*.log"), *host.home.glob("logs/*.log")):
                (folder / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / name)

    def close(self) -> None:
        """Closes all connections."""
        self._dagster.dispose()
        self._catalogue.close()
        self._queue.close()

    def _is_unsafe(self) -> bool:
        """Whether an image would fail as `poison` if its run were lost once more."""
        try:
            return any(
                sum(event["event"] == "recovered" for event in self._catalogue.get(name)["history"])
                >= POISON_RECOVERIES - 1
                for status in (Status.PENDING, Status.PROCESSING)
                for row in self._catalogue.list_unended(status, 100)
                for name in [row["id"]]
            )
        except PostponedError:
            return True

    def _is_calm(self) -> bool:
        try:
            counts = self._catalogue.count()
            if counts["pending"] or counts["processing"] or self._queue.count()["waiting"]:
                return False
            if self._events.list_unsent(1):
                return False
            return not self._dagster.get_runs(dg.RunsFilter(statuses=UNFINISHED), limit=1)
        except (ImagePipelineError, sa.exc.DBAPIError):  # a server still starts
            return False

    def _can_break(self, kind: str) -> bool:
        """Whether this system lets us do a kind of fault."""
        if kind == "move clock":
            return all(clock.environment for clock in self._world.clocks.values())
        return kind != "fill disk" or self._world.disk.is_small


def _collect(checks: Sequence[Iterable[str]]) -> list[str]:
    """What checks have found, and that one of them failed."""
    found: list[str] = []
    try:
        for check in checks:
            found.extend(check)
    except Exception as error:
        found.append(f"the check failed: {type(error).__name__}: {error}")
    return found


@contextmanager
def open_soak(seeds: random.Random, has_bucket: bool) -> Iterator[Soak]:
    """Starts the servers, and gives the soak whose machines can be started."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ip", dir="/tmp")))
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pg", dir="/tmp")))
        postgres, redis, disk = Postgres(data), Redis(folder), Disk(folder / "disk")
        stack.callback(disk.close)
        stack.callback(redis.stop)
        stack.callback(postgres.stop)
        urls = (postgres.create_database("catalogue"), postgres.create_database("dagster"))
        root = str(disk.folder)
        if has_bucket:
            os.environ.update(stack.enter_context(s3_bucket()))
            root, disk.is_small = "s3://images/soak", False
        provider = stack.enter_context(closing(Provider(seeds.getrandbits(32))))
        links = [Link(redis.socket), Link(postgres.socket)]
        clocks = {name: Clock(folder, name) for name in ("alpha", "beta")}
        near = {"REDIS_URL": redis.url, "DATABASE_URL": urls[0], "DAGSTER_DATABASE_URL": urls[1]}
        far = {"REDIS_URL": f"redis://127.0.0.1:{links[0].port}/0"} | {
            name: sa.make_url(url)
            .set(query={}, host="127.0.0.1", port=links[1].port)
            .render_as_string(hide_password=False)
            for name, url in near.items()
            if name != "REDIS_URL"
        }
        shared = {
            "OPENAI_API_KEY": "key",
            "OPENROUTER_API_KEY": "key",
            "IMAGEPIPELINE_RATE_LIMIT": "off",
            "IMAGEPIPELINE_MAX_RUNS": str(MAX_RUNS),
            "IMAGEPIPELINE_WORKER_SLOTS": str(SLOTS),
            "IMAGEPIPELINE_STORAGE_ROOT": root,
            "IMAGEPIPELINE_INDEX_ROOT": f"{root}/lancedb",
            "IMAGEPIPELINE_WEBSERVER_PORT": str(find_port()),
            **{name: value for name, value in os.environ.items() if name.startswith("AWS_")},
        }
        commands = {"alpha": ("up",), "beta": ("service", "worker")}
        hosts = {
            name: Host(
                folder,
                name,
                command,
                shared
                | (near if name == "alpha" else far)
                | clocks[name].environment
                | dict.fromkeys(("OPENAI_BASE_URL", "OPENROUTER_BASE_URL"), provider.url_for(name)),
            )
            for name, command in commands.items()
        }
        world = World(hosts, clocks, links, postgres, redis, disk, provider)
        soak = Soak(folder, root, seeds, world, urls)
        stack.callback(soak.close)
        for host in hosts.values():
            stack.callback(host.kill)
        soak.start()
        keeps = (*(host.keep for host in hosts.values()), postgres.keep, redis.keep)
        stack.callback(Keeper(*keeps).stop)
        yield soak


def main() -> None:
    """Runs the soak and prints its report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="in all")
    parser.add_argument("--uploads", type=int, help="17 a minute if not given")
    parser.add_argument("--faults", type=int, help="4.3 a minute if not given")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--bucket", action="store_true", help="store in a bucket; no full disk")
    parser.add_argument("--report", type=Path, help="write the report to this file, as JSON")
    parser.add_argument("--keep-logs", type=Path, help="copy the machines' logs to this folder")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # it leaves nothing behind, however it is stopped
        signal.signal(number, signal.default_int_handler)
    report, began = Report(options.seed), time.monotonic()
    with open_soak(random.Random(options.seed), options.bucket) as soak:
        print(f"started after {time.monotonic() - began:.0f} s", flush=True)
        soak.run(
            max(10.0, options.minutes * 60 - CALM_SECONDS - (time.monotonic() - began)),
            options.uploads or round(options.minutes * UPLOADS_PER_MINUTE),
            options.faults or round(options.minutes * FAULTS_PER_MINUTE),
        )
        print(f"mended after {time.monotonic() - began:.0f} s", flush=True)
        report.calm_seconds = round(soak.wait_until_calm(), 1)
        report.seconds = round(time.monotonic() - began)
        print(f"calm after {report.seconds} s", flush=True)
        soak.check(report)
        if options.keep_logs:
            soak.copy_logs(options.keep_logs)
    if report.calm_seconds > CALM_SECONDS:
        report.violations["late"] = [f"calm only after {report.calm_seconds} s"]
    print(*report.describe(), sep="\n", flush=True)
    if options.report:
        options.report.write_text(json.dumps(asdict(report), indent=1))
    sys.exit(int(not report.is_clean))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
