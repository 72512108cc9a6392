"""Times `plan` and what `apply` asks for, on a catalogue of many images; a third are outdated.

python -m benchmarks.plan [--images 100000] [--rounds 5]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.stack import describe_machine
from imagepipeline.filters import Filter
from imagepipeline.models import Recipe, now_utc
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.plans import Plans
from imagepipeline.stores.tables import image_results, images
from imagepipeline_tests.conftest import postgres_database, postgres_server

RECIPES = {
    "metadata": Recipe("openai", "gpt-4o-mini", "prompt-12345678,1024px,auto"),
    "variants": Recipe("local", "pillow", "640-webp-80,640-avif-63,1024-webp-80,1024-avif-63"),
    "embedding": Recipe("openrouter", "text-embedding-3-small"),
}
CHUNK = 10_000


@contextmanager
def open_databases() -> Iterator[dict[str, str]]:
    """The URLs of an empty SQLite database and an empty Postgres database."""
    with (
        tempfile.TemporaryDirectory() as folder,
        postgres_server() as server,
        postgres_database(server) as postgres,
    ):
        yield {"sqlite": f"sqlite:///{Path(folder, 'catalogue.sqlite')}", "postgres": postgres}


def fill(url: str, count: int) -> None:
    """Fills a catalogue with completed images, of each third of which all results are outdated."""
    with closing(Catalogue(url)) as catalogue:
        catalogue.migrate()
    engine, now = sa.create_engine(url), now_utc()
    for start in range(0, count, CHUNK):
        numbers = range(start, min(start + CHUNK, count))
        with engine.begin() as connection:
            connection.execute(sa.insert(images), [_build_image(number, now) for number in numbers])
            connection.execute(
                sa.insert(image_results),
                [row for number in numbers for row in _build_results(number, now)],
            )
    # As autovacuum does, for Postgres reads an index alone only on pages that it has vacuumed.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE" if "postgres" in url else "ANALYZE")
    engine.dispose()


def _build_image(number: int, now: Any) -> dict[str, Any]:
    return {
        "id": f"image-{number:08d}",
        "status": "completed",
        **dict.fromkeys(("generation", "fence", "beat", "attempts"), 1),
        "priority": 0,
        "accepted_at": now,
        "updated_at": now,
        "original_sha256": f"{number:064x}",
        "placeholder": "data:image/webp;base64," + "A" * 120,
        "metadata": {
            "description": "A cat sleeps on a red sofa beside an open window. " * 3,
            "tags": ["cat", "sofa", "window", f"tag {number % 100}"],
            "category": f"category {number % 10}",
            "dominantColors": ["#aabbcc", "#112233"],
            "mood": "calm",
        },
    }


def _build_results(number: int, now: Any) -> Iterator[dict[str, Any]]:
    for asset, recipe in RECIPES.items():
        yield {
            "image_id": f"image-{number:08d}",
            "asset": asset,
            "generation": 1,
            "provider": recipe.provider,
            "model": recipe.model,
            "settings": recipe.settings if number % 3 else "earlier settings",
            "input_sha256": f"{number:064x}",
            "made_at": now,
        }


def time_medians(plans: Plans, count: int, rounds: int) -> dict[str, float]:
    """The median seconds of each question; the first round is left out."""
    where = Filter.parse(["category=category 1", "tag=tag 1"])
    questions: dict[str, Callable[[], object]] = {
        "plan": lambda: plans.count_outdated(RECIPES),
        "plan --where": lambda: plans.count_outdated(RECIPES, where),
        "images to apply": lambda: plans.count_images(RECIPES),
        "first ten": lambda: plans.list_outdated(RECIPES, "", 10),
        "last ten": lambda: plans.list_outdated(RECIPES, f"image-{count - 50:08d}", 10),
    }
    return {name: _time_median(question, rounds) for name, question in questions.items()}


def _time_median(question: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        started = time.monotonic()
        question()
        seconds.append(time.monotonic() - started)
    return round(statistics.median(seconds[1:]), 3)


def measure(count: int, rounds: int) -> dict[str, Any]:
    """The median seconds by database and question."""
    with open_databases() as databases:
        for url in databases.values():
            fill(url, count)
        return {
            "machine": describe_machine(),
            "images": count,
            "seconds": {
                name: time_medians(Plans(url), count, rounds) for name, url in databases.items()
            },
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.images, arguments.rounds), indent=2))
