"""Checks that many images do not use up connections to Postgres or leave keys in Redis.

    python -m imagepipeline_tests.end_to_end.bounds                # 250 images, about 8 minutes

It prints the number of connections at rest, and the maximum in the first and the second half, and
every key left in Redis at the end, with its time to live.
"""

import argparse
import signal
import time
from contextlib import closing

import sqlalchemy as sa

from imagepipeline_tests.end_to_end.drill import Drill, drill
from imagepipeline_tests.end_to_end.worker_drills import databases

SLOTS = 3
MAX_CONNECTIONS_PER_SLOT = 3
MAX_TTL_SECONDS = 3600


def count_connections(server: sa.Connection) -> int:
    """Counts the connections to Postgres of the whole stack."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname LIKE 'test_%%'"
    return int(server.exec_driver_sql(query).scalar_one())


def list_keys(stack: Drill) -> dict[str, int]:
    """Returns the keys of tasks in Redis and their time to live in seconds, -1 for ever."""
    with closing(stack.redis()) as client:
        return {
            key: client.ttl(key)
            for key in client.scan_iter(f"{stack.settings.queue_prefix}:runs:*")
        }


def measure(stack: Drill, images: int) -> tuple[list[int], dict[str, int], dict[str, int]]:
    """Processes the images, then more with a worker that is killed.

    Returns:
        The number of connections over time, and the keys before and after the kill.
    """
    server = sa.create_engine(
        stack.settings.dagster_database_url.get_secret_value(), isolation_level="AUTOCOMMIT"
    )
    counts = []
    with server.connect() as connection:
        counts.append(count_connections(connection))
        stack.push(images)
        while stack.count("completed", "failed") < images:
            counts.append(count_connections(connection))
            time.sleep(0.2)
    stack.check()
    before = list_keys(stack)
    stack.push(6)
    stack.wait_until_working()
    stack.tell(signal.SIGKILL, stack.worker)
    stack.measure_completion(time.monotonic())
    stack.check()
    return counts, before, list_keys(stack)


def check(counts: list[int], before: dict[str, int], after: dict[str, int]) -> None:
    """Checks that connections do not grow and only the names of queues stay in Redis."""
    half = len(counts) // 2
    assert max(counts[half:]) <= max(counts[:half]) + MAX_CONNECTIONS_PER_SLOT, counts
    for keys in (before, after):
        lasting = {
            key for key, ttl_seconds in keys.items() if not 0 <= ttl_seconds <= MAX_TTL_SECONDS
        }
        assert all("_kombu.binding" in key for key in lasting), keys
    assert {key for key in after if "_kombu.binding" in key} <= {
        key for key in before if "_kombu.binding" in key
    }


def main() -> None:
    """Measures, prints the results and checks them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # The colour of an image encodes its number, which must be below 256.
    parser.add_argument("--images", type=int, default=250)
    options = parser.parse_args()
    slots = {"IMAGEPIPELINE_WORKER_SLOTS": str(SLOTS), "IMAGEPIPELINE_MAX_RUNS": str(SLOTS)}
    with databases(True) as urls, drill(call_seconds=0.05, **slots, **urls) as stack:
        counts, before, after = measure(stack, options.images)
    half = len(counts) // 2
    print(
        f"connections: {counts[0]} at rest, at most {max(counts[:half])} in the first half, "
        f"{max(counts[half:])} in the second"
    )
    for name, keys in (("after the burst", before), ("after a killed worker", after)):
        print(
            name, *(f"  {key} {ttl_seconds}" for key, ttl_seconds in sorted(keys.items())), sep="\n"
        )
    check(counts, before, after)


if __name__ == "__main__":
    main()
