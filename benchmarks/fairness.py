"""Measures how long one tenant's single uploads take, alone and while another's thousands wait.

python -m benchmarks.fairness PHOTOS [--waiting 10000] [--count 8] [--workers 2 [--slots 4]]

With `--workers`, the work is done by so many simulated machines, which share these slots.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.machines import run_machines
from benchmarks.stack import Stack, describe_machine, run_provider, run_stack
from benchmarks.throughput import CHAT_SECONDS, EMBED_SECONDS, collect, share_slots
from imagepipeline.models import Upload
from imagepipeline.storage import open_storage
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.uploads import UploadQueue

DIFFERENT = 400  # originals of the waiting images; more than are made meanwhile


def measure(
    folder: Path, waiting: int, count: int, workers: int | None, slots: int
) -> dict[str, Any]:
    """Returns the seconds from push to completion of the single uploads, and their ratio."""
    machine, photos = describe_machine(), sorted(collect(folder, 20).iterdir())
    with ExitStack() as exits:
        provider = exits.enter_context(run_provider(CHAT_SECONDS, EMBED_SECONDS))
        stack = exits.enter_context(
            run_machines(provider | share_slots(workers, slots), workers)
            if workers
            else run_stack(provider)
        )
        alone = list(time_single_uploads(stack, photos, count, "alone"))
        push_many(stack, photos, waiting)
        time.sleep(15)
        beside = list(time_single_uploads(stack, photos, count, "beside"))
        with closing(Catalogue(stack.settings.database_url)) as catalogue:
            left = catalogue.count()
    return {
        "machine": machine,
        "alone_seconds": [round(one, 2) for one in alone],
        "beside_seconds": [round(one, 2) for one in beside],
        "ratio_of_medians": round(statistics.median(beside) / statistics.median(alone), 2),
        "images_at_the_end": left,
    }


def push_many(stack: Stack, photos: list[Path], count: int) -> None:
    """Stores originals, some of them different and the others links to one, and pushes them."""
    files = open_storage(stack.settings.storage)
    entries = []
    for number, photo in enumerate(islice(cycle(photos), count)):
        path = f"original/big-{number}.jpg"
        if number < DIFFERENT:
            content = photo.read_bytes() + number.to_bytes(4, "big")
            files.put_original(f"big-{number}", content, "jpg")
        else:
            root = stack.settings.storage
            os.link(Path(root, "original/big-0.jpg"), Path(root, path))
        entries.append(Upload(f"big-{number}", path, tenant="big").to_entry())
    with closing(UploadQueue(stack.settings.redis_url, stack.settings.queue_prefix)) as queue:
        queue.redis.lpush(queue.wait_key, *entries)


def time_single_uploads(stack: Stack, photos: list[Path], count: int, name: str) -> Iterator[float]:
    """Yields the seconds that each of some uploads takes, one after another."""
    files = open_storage(stack.settings.storage)
    for number, photo in enumerate(islice(cycle(photos), count)):
        image_id = f"{name}-{number}"
        files.put_original(image_id, photo.read_bytes() + name.encode(), "jpg")
        with closing(UploadQueue(stack.settings.redis_url, stack.settings.queue_prefix)) as queue:
            queue.redis.lpush(queue.wait_key, Upload(image_id, tenant="small").to_entry())
        yield max(stack.wait([image_id]).values())
        time.sleep(1.3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--slots", type=int, default=4, help="of all workers together")
    options = parser.parse_args()
    measured = measure(
        options.photos, options.waiting, options.count, options.workers, options.slots
    )
    print(json.dumps(measured, indent=2))
