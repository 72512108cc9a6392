"""Checks that many images do not use up connections to Postgres or leave keys in Redis.

    python -m imagepipeline_tests.end_to_end.bounds                # 250 images, about 8 minutes

It prints the number of connections at rest, and the maximum in the first and the second half; the
memory of the stack before and after; who holds connections and memory in the end; and every key
left in Redis, with its time to live.
"""

import argparse
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing

import sqlalchemy as sa

from benchmarks.stack import list_tree, name_process, read_pss_bytes
from imagepipeline_tests.end_to_end.drill import Drill, drill
from imagepipeline_tests.end_to_end.worker_drills import databases

SLOTS = 3
MAX_CONNECTIONS_PER_SLOT = 3
MAX_TTL_SECONDS = 3600
REST_SECONDS = 20  # until the index is imported, or used children have been replaced


def count_connections(server: sa.Connection) -> int:
    """Counts the connections to Postgres of the whole stack."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname LIKE 'test_%%'"
    return int(server.exec_driver_sql(query).scalar_one())


def list_holders(server_folder: str) -> dict[str, int]:
    """Returns how many connections to the Postgres server in a folder each process role holds."""
    listed = subprocess.run(["ss", "-xpH"], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in listed.splitlines()]
    clients = {line[7] for line in lines if line[4].startswith(server_folder)}
    pids = [
        int(pid)
        for line in lines
        if line[5] in clients
        for pid in re.findall(r"pid=(\d+)", line[-1])
    ]
    return dict(Counter(map(name_process, pids)))


def list_memory(root: int) -> dict[str, int]:
    """Returns the memory in MB of each process role of the stack; shared pages count once (PSS)."""
    memory: Counter[str] = Counter()
    for pid in list_tree(root):
        memory[name_process(pid)] += read_pss_bytes(pid)
    return {name: used_bytes // 1_000_000 for name, used_bytes in memory.most_common()}


def list_keys(stack: Drill) -> dict[str, int]:
    """Returns the keys of tasks in Redis and their time to live in seconds, -1 for ever."""
    with closing(stack.redis()) as client:
        return {
            key: client.ttl(key)
            for key in client.scan_iter(f"{stack.settings.queue_prefix}:runs:*")
        }


def process(stack: Drill, images: int, watch: Callable[[], None] = lambda: None) -> list[int]:
    """Processes images, and calls `watch` now and then; returns the connections over time."""
    server = sa.create_engine(
        stack.settings.dagster_database_url.get_secret_value(), isolation_level="AUTOCOMMIT"
    )
    counts = []
    with server.connect() as connection:
        counts.append(count_connections(connection))
        stack.push(images)
        while stack.count("completed", "failed") < images:
            counts.append(count_connections(connection))
            watch()
            time.sleep(0.2)
    stack.check()
    return counts


def kill_worker(stack: Drill) -> tuple[dict[str, int], dict[str, int]]:
    """Kills a worker at work; returns the keys before, and after the work is done."""
    before = list_keys(stack)
    stack.push(6)
    stack.wait_until_working()
    stack.tell(signal.SIGKILL, stack.worker)
    stack.measure_completion(time.monotonic())
    stack.check()
    return before, list_keys(stack)


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
        server_folder = str(sa.make_url(urls["DATABASE_URL"]).query["host"])
        most: list[dict[str, int]] = [{}]

        def watch() -> None:
            holders = list_holders(server_folder)
            if sum(holders.values()) > sum(most[-1].values()):
                most.append(holders)

        time.sleep(REST_SECONDS)
        memory = [list_memory(stack.pid)]
        counts = process(stack, options.images, watch)
        time.sleep(REST_SECONDS)
        memory.append(list_memory(stack.pid))
        before, after = kill_worker(stack)
    half = len(counts) // 2
    print(
        f"connections: {counts[0]} at rest, at most {max(counts[:half])} in the first half, "
        f"{max(counts[half:])} in the second; two are ours"
    )
    print("  at most", most[-1])
    for when, used in zip(("at rest", "after the burst"), memory, strict=True):
        print(f"memory {when}: {sum(used.values())} MB", used)
    for name, keys in (("after the burst", before), ("after a killed worker", after)):
        print(
            name, *(f"  {key} {ttl_seconds}" for key, ttl_seconds in sorted(keys.items())), sep="\n"
        )
    check(counts, before, after)


if __name__ == "__main__":
    main()
