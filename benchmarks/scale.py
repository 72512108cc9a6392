"""Times what every tick and page asks of a catalogue of many made images, and weighs its tables.

python -m benchmarks.scale [--images 1000 10000 100000]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from benchmarks.plan import open_databases
from benchmarks.stack import describe_machine
from imagepipeline.models import Recipe, now_utc
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.plans import Plans
from imagepipeline.stores.retention import Retention
from imagepipeline.stores.tables import schema
from imagepipeline_tests.made_rows import make_rows

ROUNDS = 5
RECIPES = {"metadata": Recipe("local", "another"), "embedding": Recipe("local", "a-model")}


def main() -> None:
    """Prints a line of JSON for each database and number of images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 100_000])
    counts = parser.parse_args().images
    print(json.dumps(describe_machine()))
    for count in counts:
        with open_databases() as databases:
            for name, url in databases.items():
                make_rows(url, count)
                print(json.dumps({"database": name, "images": count} | measure(url)), flush=True)


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
    """Bytes an image by table with its indexes; of SQLite the whole file alone."""
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        count = connection.exec_driver_sql("SELECT count(*) FROM images").scalar_one()
        if engine.dialect.name == "sqlite":
            size = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
            return {"all": connection.exec_driver_sql(size).scalar_one() // count}
        weights = {
            table.name: connection.exec_driver_sql(
                f"SELECT pg_total_relation_size('{table.name}')"
            ).scalar_one()
            // count
            for table in schema.sorted_tables
        }
    return {name: weight for name, weight in weights.items() if weight} | {
        "all": sum(weights.values())
    }


if __name__ == "__main__":
    main()
