"""Measures how costs grow with the number of images, on SQLite and Postgres.

python -m benchmarks.scale [--images 1000 10000 100000]   what ticks and pages ask; bytes by table
python -m benchmarks.scale --work                          also a stack at work on top of them
python -m benchmarks.scale --pushes 10000                  a stack that drains so many pushes
python -m benchmarks.scale --index 1000 10000              size and files of the index
python -m benchmarks.scale --plot FIGURES PICTURE          plots what `--work` has printed
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.plan import open_databases
from benchmarks.stack import Stack, describe_machine, run_stack
from imagepipeline.models import Claim, Embedding, Recipe, now_utc
from imagepipeline.settings import Settings
from imagepipeline.stores import vectors
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.plans import Plans
from imagepipeline.stores.retention import Retention
from imagepipeline.stores.tables import schema
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline_tests.conftest import postgres_database, postgres_server
from imagepipeline_tests.made_rows import copy_in_dagster, make_rows

ROUNDS = 5
RECIPES = {"metadata": Recipe("local", "another"), "embedding": Recipe("local", "a-model")}
IDLE_SECONDS, SINGLE_PUSHES, BURST = 40, 11, 40
DRAIN_SECONDS = 240
DIMENSIONS = 384
IN_DAGSTER = Settings.model_fields["keep_partitions"].default


def main() -> None:
    """Prints a line of JSON for each database and number of images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgres"])
    parser.add_argument("--work", action="store_true")
    parser.add_argument("--pushes", type=int)
    parser.add_argument("--index", type=int, nargs="+")
    parser.add_argument("--plot", type=Path, nargs=2)
    options = parser.parse_args()
    if options.plot:
        plot(*options.plot)
        return
    show(machine=describe_machine())
    if options.index:
        for count in options.index:
            show(rows=count, **measure_index(count))
    elif options.pushes:
        show(pushes=options.pushes, **measure_pushes(options.pushes))
    elif options.work:
        for count in options.images:
            for name in options.databases:
                with open_stack(name) as stack:
                    show(database=name, images=count, **measure_work(stack, count))
    else:
        for count in options.images:
            with open_databases() as databases:
                for name in options.databases:
                    make_rows(databases[name], count)
                    show(database=name, images=count, **measure(databases[name]))


def show(**figures: Any) -> None:
    """Prints figures as a line of JSON."""
    print(json.dumps(figures), flush=True)


def measure(url: str) -> dict[str, Any]:
    """Milliseconds of what ticks and pages ask, bytes an image by table, and a prune."""
    now = now_utc()
    catalogue, ledger, plans = Catalogue(url), Ledger(url), Plans(url)
    retention = Retention(url)
    asked: Mapping[str, Callable[[], object]] = {
        "tick": lambda: (
            catalogue.list_pending(15),
            catalogue.list_processing(),
            catalogue.count_bulk(),
            ledger.list_pauses(),
            ledger.sum_cost_usd(now - timedelta(days=30)),
        ),
        "status_of_one": lambda: catalogue.get("made-7"),
        "status": lambda: (catalogue.count(), catalogue.count_failures()),
        "list_failed": lambda: catalogue.list_ended("failed", limit=50),
        "plan": lambda: plans.count_outdated(RECIPES),
        "dry_run": lambda: plans.list_outdated(RECIPES, "", 1000),
        "queue": lambda: (
            catalogue.count(),
            catalogue.count_events("completed", now - timedelta(hours=1)),
            catalogue.find_oldest(),
        ),
        "oldest_in_dagster": lambda: retention.list_oldest(50),
    }
    with closing(catalogue):
        times = {name: time_it(ask) for name, ask in asked.items()}
        weights = weigh(url)
        began = time.perf_counter()
        pruned = 0
        while count := retention.prune_calls(now - timedelta(days=7), 500):
            pruned += count
        rate = pruned / (time.perf_counter() - began)
    return {"ms": times, "bytes_an_image": weights, "calls_pruned_a_second": round(rate)}


def time_it(ask: Callable[[], object]) -> float:
    """The median time of five calls in milliseconds, after one to warm up."""
    ask()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        ask()
        times.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(times), 1)


def weigh(url: str) -> dict[str, int]:
    """Bytes an image by table with its indexes."""
    engine = sa.create_engine(url)
    of_table = (
        "SELECT sum(pgsize) FROM dbstat JOIN sqlite_schema USING (name) WHERE tbl_name = '{}'"
        if engine.dialect.name == "sqlite"
        else "SELECT pg_total_relation_size('{}')"
    )
    with engine.connect() as connection:
        count = connection.exec_driver_sql("SELECT count(*) FROM images").scalar_one()
        weights = {
            table.name: connection.exec_driver_sql(of_table.format(table.name)).scalar_one()
            // count
            for table in schema.sorted_tables
        }
    engine.dispose()
    return {name: weight for name, weight in weights.items() if weight} | {
        "all": sum(weights.values())
    }


@contextmanager
def open_stack(database: str) -> Iterator[Stack]:
    """A stack with the local models, on SQLite or Postgres."""
    with ExitStack() as opened:
        urls = {"DATABASE_URL": "", "DAGSTER_DATABASE_URL": ""}
        if database == "postgres":
            server = opened.enter_context(postgres_server())
            urls = {name: opened.enter_context(postgres_database(server)) for name in urls}
        yield opened.enter_context(run_stack(urls))


def measure_work(stack: Stack, count: int) -> dict[str, Any]:
    """What an image costs with so many made ones, of which Dagster has as many as it keeps."""
    photos = make_photos(1 + SINGLE_PUSHES + BURST)
    [sample] = stack.push([next(photos)])
    stack.wait([sample])
    with closing(Catalogue(stack.settings.database_url)) as catalogue:
        run_id = (catalogue.get(sample) or {})["run_id"]
    kept = min(count, IN_DAGSTER)
    make_rows(stack.settings.database_url, count, pending=0, in_dagster=kept)
    urls = list_dagster_urls(stack.settings)
    numbers = range(count - kept + 1, count + 1)
    copy_in_dagster(urls["event_log"], urls["runs"], sample, run_id, numbers)
    time.sleep(60)  # the first reports and prunes are over

    before = stack.measure_cpu_seconds()
    time.sleep(IDLE_SECONDS)
    idle = sum(stack.measure_cpu_seconds().values()) - sum(before.values())
    latencies = []
    for _ in range(SINGLE_PUSHES):
        latencies.append(max(stack.wait(stack.push([next(photos)])).values()))
        time.sleep(1.3)  # so that pushes arrive at different points of the daemon's loops
    before, began = stack.measure_cpu_seconds(), time.monotonic()
    ended = stack.wait(stack.push([*photos]))
    seconds = time.monotonic() - began
    used = stack.measure_cpu_seconds()
    memory_bytes = stack.measure_memory_bytes()
    return {
        "idle_cpu_share": round(idle / IDLE_SECONDS, 3),
        "latency_p50_seconds": round(statistics.median(latencies), 2),
        "latency_seconds": [round(one, 2) for one in latencies],
        "images_per_minute": round(60 * len(ended) / seconds, 1),
        "cpu_seconds_an_image": round((sum(used.values()) - sum(before.values())) / len(ended), 3),
        "cpu_seconds_by_process": {
            name: round((spent - before.get(name, 0)) / len(ended), 3)
            for name, spent in sorted(used.items())
        },
        "memory_mb": sum(memory_bytes.values()) // 1_000_000,
        "of_one": weigh_run(urls["event_log"], run_id),
    }


def weigh_run(url: str, run_id: str) -> dict[str, int]:
    """How many events Dagster has of a run, and their bytes."""
    engine = sa.create_engine(url)
    query = sa.text("SELECT count(*), sum(length(event)) FROM event_logs WHERE run_id = :run_id")
    with engine.connect() as connection:
        events, bytes_ = connection.execute(query, {"run_id": run_id}).one()
    engine.dispose()
    return {"events": events, "bytes": bytes_}


def list_dagster_urls(settings: Settings) -> dict[str, str]:
    """The URLs of Dagster's databases of events and of runs."""
    if settings.dagster_database_url:
        return dict.fromkeys(
            ("event_log", "runs"), settings.dagster_database_url.get_secret_value()
        )
    folder = settings.home / "dagster" / "storage"
    return {name: f"sqlite:///{folder / name}.db" for name in ("event_log", "runs")}


def measure_pushes(count: int) -> dict[str, Any]:
    """Pushes IDs at once, each twice, and measures how fast they are taken in and processed."""
    ids = [f"burst-{number:06d}" for number in range(count // 2)]
    with open_stack("sqlite") as stack:
        warm = stack.push([*make_photos(BURST)])
        began = time.monotonic()
        stack.wait(warm)
        alone = 60 * len(warm) / (time.monotonic() - began)
        folder = Path(stack.settings.storage, "original")
        for image_id, content in zip(ids, draw(len(ids)), strict=True):
            (folder / f"{image_id}.jpg").write_bytes(content)
        began = time.monotonic()
        with closing(UploadQueue(stack.settings.redis_url, stack.settings.queue_prefix)) as queue:
            for image_id in (*ids, *ids):
                queue.enqueue(image_id)
            pushed = time.monotonic() - began
            taken_in = None
            done = []
            while time.monotonic() - began < DRAIN_SECONDS:
                time.sleep(5)
                with closing(Catalogue(stack.settings.database_url)) as catalogue:
                    counts = catalogue.count()
                if taken_in is None and not queue.count()["waiting"]:
                    taken_in = round(time.monotonic() - began)
                done.append((round(time.monotonic() - began), counts["completed"] - len(warm)))
        rows = sum(counts.values()) - len(warm)
    return {
        "pushed_in_seconds": round(pushed, 1),
        "taken_in_after_seconds": taken_in,
        "images": rows,
        "failed": counts["failed"],
        "images_per_minute_alone": round(alone, 1),
        "images_per_minute": round(60 * done[-1][1] / done[-1][0], 1),
        "completed_by_second": done[5::6],
    }


def measure_index(count: int) -> dict[str, Any]:
    """Stores vectors one by one, and weighs the index meanwhile and once it rests.

    It is about 20 times as fast as uploads on two cores, so readers have a 20th of their patience.
    """
    import numpy as np

    vectors.READERS_PATIENCE /= 20
    made = np.random.default_rng(0).random((count, DIMENSIONS), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        index = vectors.BatchingIndex(folder)
        most_bytes, began = 0, time.monotonic()
        for row in range(count):
            text = f"A cat sits on sofa {row} beside a window. cat, sofa, window. animal. calm"
            embedding = Embedding(text, tuple(map(float, made[row])), "local:all-MiniLM-L6-v2-int8")
            index.upsert(Claim(f"image-{row:08d}", 1, 1, None), embedding)
            if not row % 50:
                most_bytes = max(most_bytes, weigh_folder(folder)[0])
        seconds = time.monotonic() - began
        time.sleep(vectors.READERS_PATIENCE.total_seconds() + 10)
        size_bytes, files = weigh_folder(folder)
    vectors.READERS_PATIENCE *= 20
    return {
        "seconds": round(seconds),
        "most_times_vectors": round(most_bytes / (count * 4 * DIMENSIONS), 2),
        "times_vectors": round(size_bytes / (count * 4 * DIMENSIONS), 2),
        "files": files,
    }


def weigh_folder(folder: str) -> tuple[int, int]:
    """The bytes of all files below a folder, and their number."""
    sizes = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
    return sum(sizes), len(sizes)


def make_photos(count: int) -> Iterator[Path]:
    """Files with small pictures, no two alike."""
    folder = Path(tempfile.mkdtemp())
    for number, content in enumerate(draw(count)):
        path = folder / f"photo{number:03d}.jpg"
        path.write_bytes(content)
        yield path


def draw(count: int) -> Iterator[bytes]:
    """Small JPEGs, no two alike."""
    from PIL import Image

    for _ in range(count):
        noise = Image.frombytes("RGB", (8, 6), os.urandom(144)).resize((480, 360))
        buffer = io.BytesIO()
        noise.save(buffer, "jpeg")
        yield buffer.getvalue()


def plot(figures: Path, picture: Path) -> None:
    """Plots each figure of `--work` over the number of images, as multiples of the first."""
    import matplotlib

    matplotlib.use("svg" if picture.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in figures.read_text().splitlines()]
    lines = [line for line in lines if "cpu_seconds_an_image" in line]
    shown = {
        "CPU an image": "cpu_seconds_an_image",
        "latency": "latency_p50_seconds",
        "CPU while idle": "idle_cpu_share",
    }
    chart, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for database, style in (("sqlite", "-o"), ("postgres", "--s")):
        rows = [line for line in lines if line["database"] == database]
        for (label, name), color in zip(
            shown.items(), ("#2e6fb0", "#c05020", "#888888"), strict=True
        ):
            values = [row[name] / rows[0][name] for row in rows]
            counts = [row["images"] for row in rows]
            axes.plot(counts, values, style, color=color, label=f"{label}, {database}")
    axes.axhline(1.1, color="#cccccc", linewidth=1)
    axes.set_xscale("log")
    axes.set_ylim(0, 2)
    axes.set_xlabel("images in the catalogue")
    axes.set_ylabel("times the cost with 1,000 images")
    axes.legend(fontsize=8, ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    chart.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
