"""Compares a burst on SQLite and on Postgres: images per minute, and CPU time by process.

python -m benchmarks.databases PHOTOS [--count 60] [--rounds 3]
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks.stack import describe_machine, run_provider, run_stack
from benchmarks.throughput import CHAT_SECONDS, EMBED_SECONDS, MATCHED, collect
from imagepipeline_tests.conftest import postgres_database, postgres_server


def measure_burst(settings: dict[str, str], photos: list[Path]) -> dict[str, Any]:
    """Measures one burst on a fresh stack; CPU seconds are per image and exclude Postgres."""
    with run_stack(MATCHED | settings) as stack:
        before = stack.measure_cpu_seconds()
        wall_seconds = max(stack.wait(stack.push(photos)).values())
        after = stack.measure_cpu_seconds()
    cpu = {
        name: round((seconds - before.get(name, 0)) / len(photos), 3)
        for name, seconds in sorted(after.items())
    }
    return {"images_per_minute": 60 * len(photos) / wall_seconds, "cpu_seconds_by_process": cpu}


def measure(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Alternates between the databases; `ratio` is the median of Postgres's speed over SQLite's."""
    machine, photos = describe_machine(), collect(folder, count)
    sqlite, postgres = [], []
    with run_provider(CHAT_SECONDS, EMBED_SECONDS) as provider, postgres_server() as server:
        for _ in range(rounds):
            none = {"DATABASE_URL": "", "DAGSTER_DATABASE_URL": ""}
            sqlite.append(measure_burst(provider | none, sorted(photos.iterdir())))
            with postgres_database(server) as catalogue, postgres_database(server) as dagster:
                urls = {"DATABASE_URL": catalogue, "DAGSTER_DATABASE_URL": dagster}
                postgres.append(measure_burst(provider | urls, sorted(photos.iterdir())))
    shutil.rmtree(photos)
    speeds = [[burst["images_per_minute"] for burst in bursts] for bursts in (postgres, sqlite)]
    ratios = [ours / other for ours, other in zip(*speeds, strict=True)]
    return {
        "machine": machine,
        "sqlite": sqlite,
        "postgres": postgres,
        "ratio": statistics.median(ratios),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.photos, arguments.count, arguments.rounds), indent=2))
