"""Makes one of two machines fail in several ways, and measures the time until all images complete.

    python -m imagepipeline_tests.end_to_end.machine_faults              # five minutes; a bucket
    python -m imagepipeline_tests.end_to_end.machine_faults --folder     # a shared folder

The machine fails while both have runs that wait for the provider. In the end each image has been
completed once, has one row in the index, and was described again only if a lost run was waiting for
its description.
"""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from imagepipeline_tests.conftest import postgres_server, s3_bucket
from imagepipeline_tests.end_to_end.two_machines import MAX_RUNS, Pair, open_pair

COMPLETE_SECONDS = 90  # from the end of the fault
IMAGES = 8
BRIEFLY_SECONDS = 20  # shorter than the time after which a machine counts as lost


def lose_killed(pair: Pair) -> float:
    """Kills all processes; a new machine with the same home starts after the work is done."""
    pair.beta.kill()
    pair.provider.release()
    seconds = pair.wait_until_completed(COMPLETE_SECONDS)
    pair.beta.start("worker")
    return seconds


def lose_frozen(pair: Pair) -> float:
    """Stops all processes, and continues them after others have done their work."""
    pair.beta.freeze()
    pair.provider.release()
    seconds = pair.wait_until_completed(COMPLETE_SECONDS)
    pair.beta.thaw()
    return seconds


def lose_frozen_briefly(pair: Pair) -> float:
    """Stops all processes, and continues them before they count as lost."""
    pair.beta.freeze()
    pair.provider.release()
    pair.stand_still(BRIEFLY_SECONDS)
    pair.beta.thaw()
    return pair.wait_until_completed(COMPLETE_SECONDS)


def lose_cut_off(pair: Pair) -> float:
    """Cuts the machine off from Redis, Postgres and bucket until others have done its work."""
    pair.cut_off()
    pair.provider.release()
    seconds = pair.wait_until_completed(COMPLETE_SECONDS)
    pair.mend()
    return seconds


def lose_cut_off_briefly(pair: Pair) -> float:
    """Cuts the machine off from the servers, until shortly before it counts as lost."""
    pair.cut_off()
    pair.provider.release()
    pair.stand_still(BRIEFLY_SECONDS)
    pair.mend()
    return pair.wait_until_completed(COMPLETE_SECONDS)


FAULTS: dict[str, Callable[[Pair], float]] = {
    "killed": lose_killed,
    "frozen": lose_frozen,
    "frozen briefly": lose_frozen_briefly,
    "cut off": lose_cut_off,
    "cut off briefly": lose_cut_off_briefly,
}


def lose(pair: Pair, fault: str) -> float:
    """Makes the second machine fail while both are at work, and has it work again.

    Returns:
        The seconds until all images were completed, from the start of the fault, or from the end
        of a brief one.
    """
    pair.provider.hold()
    calls = pair.provider.calls.total()
    name = fault.replace(" ", "-")
    image_ids = pair.push(name, IMAGES)
    pair.wait_until(lambda: pair.provider.at_once == MAX_RUNS, COMPLETE_SECONDS)
    lost_count = len(pair.list_unfinished_on("beta"))
    assert 0 < lost_count < MAX_RUNS
    seconds = FAULTS[fault](pair)
    assert pair.provider.calls.total() - calls <= IMAGES + lost_count
    # More runs at a time than one machine has slots show that it works again.
    pair.wait_for_workers({"alpha", "beta"})
    pair.provider.hold()
    image_ids += pair.push(f"after-{name}", IMAGES)
    pair.wait_until(lambda: pair.provider.at_once == MAX_RUNS, COMPLETE_SECONDS)
    pair.provider.release()
    pair.wait_until_completed(COMPLETE_SECONDS)
    pair.wait_until(lambda: not pair.list_unfinished_on("beta"), COMPLETE_SECONDS)
    assert pair.provider.calls.total() - calls <= 2 * IMAGES + lost_count
    pair.check()
    return seconds


@contextmanager
def open_root(is_folder: bool) -> Iterator[str]:
    """Yields a root for files and index: a folder, or a bucket with its keys in our environment."""
    if is_folder:
        with tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as folder:
            yield folder
        return
    with s3_bucket() as environment:
        os.environ.update(environment)
        yield "s3://images/machines"


def main() -> None:
    """Tries the faults one after the other on one pair of machines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", action="store_true", help="share a folder instead of a bucket")
    parser.add_argument(
        "--fault", choices=FAULTS, action="append", help="only this one; may be repeated"
    )
    options = parser.parse_args()
    with ExitStack() as stack:
        root = stack.enter_context(open_root(options.folder))
        pair = stack.enter_context(open_pair(stack.enter_context(postgres_server()), root))
        for fault in options.fault or FAULTS:
            print(f"{fault}: all completed {lose(pair, fault):.0f} s later", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
