"""Breaks an `apply` after a change of prompt, and checks what was made and what was paid.

    python -m imagepipeline_tests.end_to_end.apply_drills [--images N] [--kills N] [--postgres]

`apply` itself is killed first, then workers and the children that execute batches. Afterwards every
image is made by the new prompt, each was asked for once, and no variant was touched.

It also prints by how many bytes an image Dagster's tables have grown. Without kills, that is the
bookkeeping of an undisturbed apply: `--kills 0 --process-kills 0`.
"""

import argparse
import json
import random
import signal
import subprocess
import time
from collections import Counter

import sqlalchemy as sa

from imagepipeline.defs.batches import IMAGES_AT_ONCE, MAX_BATCH_RUNS
from imagepipeline.stores.applies import Applies
from imagepipeline_tests.end_to_end.drill import COMMAND, Drill, drill
from imagepipeline_tests.end_to_end.worker_drills import databases

PROMPT = "Say which number is on the picture."
SHARE = 0.8  # of the images, for the commands that are killed; the rest is for killed processes


BYTES = {
    "sqlite": "SELECT tbl_name, sum(pgsize) FROM dbstat JOIN sqlite_schema USING (name) GROUP BY 1",
    "postgresql": "SELECT relname, pg_total_relation_size(relid) FROM pg_stat_user_tables",
}


def weigh(stack: Drill) -> Counter[str]:
    """The bytes of each of Dagster's tables, with its indexes."""
    url = stack.settings.dagster_database_url
    urls = [url.get_secret_value()] if url else []
    folder = stack.home / "dagster" / "storage"
    bytes_of: Counter[str] = Counter()
    for one in urls or [f"sqlite:///{path}" for path in folder.glob("*.db")]:
        engine = sa.create_engine(one)
        with engine.connect() as connection:
            rows = connection.exec_driver_sql(BYTES[engine.dialect.name]).tuples()
            bytes_of.update({name: int(size) for name, size in rows})
        engine.dispose()
    return bytes_of


def list_variants(stack: Drill) -> dict[str, int]:
    """The modification times of all variants, in nanoseconds."""
    folder = stack.home / "storage" / "variants"
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def kill_commands(stack: Drill, kills: int, limit: int, rng: random.Random) -> int:
    """Starts `apply` again and again; kills it some calls after it has begun, counts those killed.

    Each waits until the lease of the one before has expired.
    """
    killed, asked = 0, [COMMAND, "apply", "--limit", str(limit)]
    applies = Applies(stack.settings.database_url)
    seen: set[int | None] = {None}

    def find_id() -> int | None:
        one = applies.find_open()
        return one.id if one else None

    for _ in range(kills):
        with subprocess.Popen(asked, stdout=stack.log, stderr=stack.log) as command:
            ended = command.poll
            stack.wait_for(lambda ended=ended: find_id() not in seen or ended() is not None)
            seen.add(find_id())
            enough = len(stack.provider.calls) + rng.randrange(1, 8)
            stack.wait_for(
                lambda enough=enough, ended=ended: (
                    len(stack.provider.calls) >= enough or ended() is not None
                )
            )
            killed += ended() is None
            command.kill()
    return killed


def kill_processes(stack: Drill, kills: int, rng: random.Random) -> None:
    """Kills the worker, or a child that executes a run, while an apply is under way."""
    with subprocess.Popen([COMMAND, "apply"], stdout=stack.log, stderr=stack.log) as command:
        for number in range(kills):
            stack.wait_for(lambda: stack.count("processing") or command.poll() is not None)
            if command.poll() is not None:
                break
            time.sleep(rng.uniform(0, 1))
            victims = stack.busy_children() if number % 2 else [stack.worker]
            stack.tell(signal.SIGKILL, *victims[:1])
            time.sleep(5)
        command.wait()


def apply_all(stack: Drill) -> dict[str, object]:
    """Lets `apply` finish; returns its last progress."""
    done = subprocess.run(
        [COMMAND, "apply", "--json"], capture_output=True, text=True, check=True
    ).stdout
    return json.loads(done)[0]


def check(stack: Drill, images: int, before: dict[str, int], calls_before: int) -> Counter[int]:
    """Checks that all is as planned; returns the calls for each image."""
    plan = subprocess.run(
        [COMMAND, "plan", "--json"], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(plan) == [], plan
    assert stack.count("completed") == images, stack.describe()
    assert list_variants(stack) == before
    calls = stack.provider.calls[calls_before:]
    counts = Counter(number for stage, number, _ in calls if stage == "metadata")
    assert len(counts) == images
    assert all(stage == "metadata" for stage, _, _ in calls)  # no text has changed
    return counts


def main() -> None:
    """Runs the drill; raises an AssertionError if something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=500, help="at most 512")
    parser.add_argument("--kills", type=int, default=20, help="of the command")
    parser.add_argument("--process-kills", type=int, default=4, help="of workers and children")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--postgres", action="store_true", help="on Postgres instead of SQLite")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    rng = random.Random(options.seed)
    with databases(options.postgres) as urls, drill(call_seconds=0.5, **urls) as stack:
        stack.push(options.images)
        stack.wait_for(lambda: stack.count("completed") == options.images, 6 * options.images)
        before, calls_before = list_variants(stack), len(stack.provider.calls)
        bytes_before = weigh(stack)
        stack.restart(IMAGEPIPELINE_VISION_PROMPT=PROMPT)
        limit = round(options.images * SHARE / max(1, options.kills))
        killed = kill_commands(stack, options.kills, limit, rng)
        stack.wait_for(lambda: stack.count("completed") == options.images)
        asked = Counter(number for _, number, _ in stack.provider.calls[calls_before:])
        print(f"{killed} commands killed, and {len(asked)} images made", flush=True)
        assert asked.total() == len(asked), asked  # no call twice
        if options.process_kills:
            kill_processes(stack, options.process_kills, rng)
        print(apply_all(stack), flush=True)
        counts = check(stack, options.images, before, calls_before)
        grown = weigh(stack) - bytes_before
        print({name: size // options.images for name, size in grown.most_common()}, flush=True)
        print(f"{grown.total() // options.images} bytes an image in Dagster's tables", flush=True)
        repeated = sum(counts.values()) - options.images
        print(f"{repeated} calls repeated")
        # A call that was under way when its process was killed must be made again.
        assert repeated <= MAX_BATCH_RUNS * IMAGES_AT_ONCE * options.process_kills, counts


if __name__ == "__main__":
    main()
