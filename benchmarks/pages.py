"""Times the pages of Dagster's UI in a browser, with many images, and weighs the webserver.

python -m benchmarks.pages [--images 1000 5000 10000 100000] [--postgres]

Needs Chromium. Made images are copies of a real one in Dagster's tables. Before each page is
opened, another image is materialized, as Dagster then counts anew what is. Each page has its
seconds until the last answer, the webserver's CPU seconds (which other work on the machine does not
change), and its slowest query.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa
from dagster._core.storage.event_log.schema import (
    AssetEventTagsTable,
    DynamicPartitionsTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.runs.schema import RunsTable, RunTagsTable
from playwright.sync_api import Page, Request, sync_playwright

from benchmarks.stack import (
    TICKS,
    Stack,
    describe_machine,
    list_tree,
    name_process,
    read_pss_bytes,
    run_stack,
)
from imagepipeline.dagster_records import OF_IMAGES, PARTITIONS
from imagepipeline_tests.conftest import PHOTOS
from imagepipeline_tests.end_to_end.ui import WINDOW, find_browser
from imagepipeline_tests.end_to_end.worker_drills import databases

IMAGES_AT_ONCE = 500
ROUNDS = 3
QUIET_SECONDS, PATIENCE_SECONDS = 1, 90
PAGES = {
    "lineage": "/asset-groups",
    "catalog": "/assets",
    "asset queue": "/assets/queue",
    "asset original": "/assets/original?view=partitions",
    "asset variants": "/assets/variants?view=partitions",
    "asset index": "/assets/index",
    "partition of original": "/assets/original?view=partitions&partition={image}",
    "partition of variants": "/assets/variants?view=partitions&partition={image}",
    "runs": "/runs",
    "one run": "/runs/{run}",
    "checks": "/assets/variants?view=checks",
}
DIALOG = "backfill dialog"
LAST_ANSWER = """since => Math.max(0, ...performance.getEntriesByType('resource')
    .filter(one => one.name.includes('/graphql') && one.startTime >= since)
    .map(one => one.responseEnd - since))"""


def main() -> None:
    """Prints a line of JSON for each number of images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 5000, 10_000, 100_000])
    parser.add_argument("--postgres", action="store_true", help="on Postgres instead of SQLite")
    options = parser.parse_args()
    print(json.dumps(describe_machine()))
    everything_stays = {"IMAGEPIPELINE_KEEP_PARTITIONS": "0"}
    with databases(options.postgres) as urls, run_stack(urls | everything_stays) as stack:
        [first] = stack.push([min(PHOTOS.glob("*.jpg"), key=lambda path: path.stat().st_size)])
        stack.wait([first])
        os.environ["DAGSTER_HOME"] = str(stack.settings.home / "dagster")
        with dg.DagsterInstance.get() as instance, open_page() as page:
            [run] = instance.get_runs(dg.RunsFilter(tags={"dagster/partition": first}))
            made, watch = 0, Watch(page)
            for count in options.images:
                grow(instance, run.run_id, first, range(made, count))
                made = count
                pages = measure(stack, instance, watch, run.run_id)
                memory = measure_webserver(stack)[1]
                found = {"images": count, "pages": pages, "webserver_bytes": memory}
                print(json.dumps({"is_postgres": options.postgres, **found}), flush=True)


def grow(instance: dg.DagsterInstance, run_id: str, image_id: str, numbers: range) -> None:
    """Copies a real run and its image's events in Dagster's tables, once for each number."""
    events, tags, runs = SqlEventLogStorageTable, AssetEventTagsTable, RunsTable
    run_tags = RunTagsTable
    storage: Any = instance.event_log_storage
    run_storage: Any = instance.run_storage
    of_image = sa.or_(
        events.c.asset_key.is_not(None), events.c.dagster_event_type.like("PIPELINE_%")
    )
    with storage.index_connection() as connection:
        copied = _read(connection, sa.select(events).where(events.c.run_id == run_id, of_image))
        originals = [row["id"] for row in copied]
    with run_storage.connect() as connection:
        [run] = _read(connection, sa.select(runs).where(runs.c.run_id == run_id))
        tags_of_run = _read(connection, sa.select(run_tags).where(run_tags.c.run_id == run_id))
    for chunk in (
        numbers[start : start + IMAGES_AT_ONCE] for start in range(0, len(numbers), IMAGES_AT_ONCE)
    ):
        names = [(f"made-{number:06}", f"{number:08x}{run_id[8:]}") for number in chunk]
        with storage.index_connection() as connection:
            last = connection.execute(sa.select(sa.func.max(events.c.id))).scalar_one()
            keys = [{"partitions_def_name": PARTITIONS, "partition": image} for image, _ in names]
            connection.execute(sa.insert(DynamicPartitionsTable), keys)
            connection.execute(
                sa.insert(events),
                [
                    _rename(row, {image_id: one, run_id: other})
                    for one, other in names
                    for row in copied
                ],
            )
            new, old = events.alias("new"), tags.alias("old")
            connection.execute(
                sa.insert(tags).from_select(
                    ["event_id", "asset_key", "key", "value", "event_timestamp"],
                    sa.select(new.c.id, old.c.asset_key, old.c.key, old.c.value, new.c.timestamp)
                    .join(old, old.c.asset_key == new.c.asset_key)
                    .where(
                        new.c.id > last,
                        new.c.dagster_event_type == "ASSET_MATERIALIZATION",
                        new.c.run_id.in_([other for _, other in names]),
                        old.c.event_id.in_(originals),
                    ),
                )
            )
        with run_storage.connect() as connection:
            renamed = [{image_id: one, run_id: other} for one, other in names]
            connection.execute(sa.insert(runs), [_rename(run, one) for one in renamed])
            connection.execute(
                sa.insert(run_tags), [_rename(row, one) for one in renamed for row in tags_of_run]
            )


def _read(connection: sa.Connection, query: sa.Select[Any]) -> list[dict[str, Any]]:
    return [{**row} for row in connection.execute(query).mappings()]


def _rename(row: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A copy of a row without its number, with other names."""
    copy = {key: value for key, value in row.items() if key != "id"}
    for old, new in names.items():
        copy = {
            key: value.replace(old, new) if isinstance(value, str) else value
            for key, value in copy.items()
        }
    return copy


@contextmanager
def open_page() -> Iterator[Page]:
    """Opens a browser that has seen the UI before, so that its scripts are cached."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        page = browser.new_page(viewport=WINDOW)
        page.set_default_timeout(1000 * PATIENCE_SECONDS)
        yield page
        browser.close()


class Watch:
    """Knows which queries of a page have not been answered."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self._open: dict[Request, float] = {}
        self._quiet_since = float("inf")
        self.slowest: tuple[float, str] = (0, "")
        page.on("request", self._begin)
        page.on("requestfinished", self._end)
        page.on("requestfailed", self._end)

    def _begin(self, request: Request) -> None:
        if "/graphql" in request.url:
            self._open[request] = time.monotonic()

    def _end(self, request: Request) -> None:
        if (began := self._open.pop(request, None)) is not None:
            self._quiet_since = time.monotonic()
            name = request.url.partition("op=")[2]
            self.slowest = max(self.slowest, (self._quiet_since - began, name))

    def wait(self, since: float = 0) -> float | None:
        """Waits until the page asks nothing more.

        Returns:
            The seconds until its last answer, from a moment in the page's time; None if it never
            came.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        self._quiet_since = float("inf")  # until the first answer
        while time.monotonic() < deadline:
            self.page.wait_for_timeout(50)
            if not self._open and time.monotonic() - self._quiet_since > QUIET_SECONDS:
                milliseconds: float = self.page.evaluate(LAST_ANSWER, since)
                return milliseconds / 1000
        return None


def measure(
    stack: Stack, instance: dg.DagsterInstance, watch: Watch, run_id: str
) -> dict[str, Any]:
    """The median seconds and CPU seconds of each page, and its slowest query."""
    page, found = watch.page, {}
    page.goto(stack.webserver_url)  # fills the browser's cache
    watch.wait()
    for name in (*PAGES, DIALOG):
        seconds: list[float | None] = []
        cpu_seconds = []
        watch.slowest = (0, "")
        for _ in range(ROUNDS):
            image_id = materialize(instance)
            before = measure_webserver(stack)[0]
            if name == DIALOG:
                seconds.append(open_dialog(stack, watch))
            else:
                path = PAGES[name].format(image=image_id, run=run_id)
                page.goto(stack.webserver_url + path, wait_until="commit")
                seconds.append(watch.wait())
            cpu_seconds.append(measure_webserver(stack)[0] - before)
        known = [one for one in seconds if one is not None]
        found[name] = {
            "seconds": round(statistics.median(known), 2) if len(known) == ROUNDS else None,
            "cpu_seconds": round(statistics.median(cpu_seconds), 2),
            "slowest": f"{watch.slowest[1]} {watch.slowest[0]:.2f} s",
        }
        print(name, found[name], file=sys.stderr, flush=True)
        page.goto("about:blank")
    return found


def materialize(instance: dg.DagsterInstance) -> str:
    """Adds an image as its run would; returns its ID."""
    image_id = f"new-{time.time_ns()}"
    instance.add_dynamic_partitions(PARTITIONS, [image_id])
    for asset in OF_IMAGES:
        instance.report_runless_asset_event(dg.AssetMaterialization(asset, partition=image_id))
    return image_id


def open_dialog(stack: Stack, watch: Watch) -> float | None:
    """Opens the dialog that materializes partitions of an asset; returns its seconds."""
    page = watch.page
    page.goto(stack.webserver_url + PAGES["asset variants"])
    watch.wait()
    since: float = page.evaluate("() => performance.now()")
    page.get_by_role("button", name="Materialize").first.click()
    page.get_by_text("Launch").last.wait_for()
    return watch.wait(since)


def measure_webserver(stack: Stack) -> tuple[float, int]:
    """The webserver's CPU seconds so far, and its memory (PSS) in bytes."""
    [pid] = [pid for pid in list_tree(stack.pid) if name_process(pid) == "webserver"]
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS, read_pss_bytes(pid)


if __name__ == "__main__":
    main()
