"""Loses one of two machines in every way, and says how long it took until all images were completed.

    python -m imagepipeline_tests.end_to_end.machine_faults              # five minutes; in a bucket
    python -m imagepipeline_tests.end_to_end.machine_faults --folder     # in a shared folder

A machine is lost while both have runs that wait for their provider. In the end each image was completed once, has one
row in the index, and was described again only if a lost run was waiting for its description.
"""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from imagepipeline_tests.conftest import postgres_server, s3_bucket
from imagepipeline_tests.end_to_end.two_machines import MAX_RUNS, Pair, open_pair

COMPLETE_SECONDS = 90  # after the cause's end
IMAGES = 8
BRIEFLY_SECONDS = 20  # less than it takes to give a machine up


def lose_killed(pair: Pair) -> float:
    """`kill -9` of all processes; another machine with that home takes its place when the work is done."""
    pair.beta.kill()
    pair.provider.release()
    seconds = pair.wait_until_completed(COMPLETE_SECONDS)
    pair.beta.start("worker")
    return seconds


def lose_frozen(pair: Pair) -> float:
    """SIGSTOP of all processes, which go on when their work was done by others."""
    pair.beta.freeze()
    pair.provider.release()
    seconds = pair.wait_until_completed(COMPLETE_SECONDS)
    pair.beta.thaw()
    return seconds


def lose_frozen_briefly(pair: Pair) -> float:
    """SIGSTOP of all processes, which go on before they are given up."""
    pair.beta.freeze()
    pair.provider.release()
    pair.stand_still(BRIEFLY_SECONDS)
    pair.beta.thaw()
    return pair.wait_until_completed(COMPLETE_SECONDS)


def lose_cut_off(pair: Pair) -> float:
    """No packet passes between the machine and Redis and Postgres until its work was done by others."""
    pair.cut_off()
    pair.provider.release()
    seconds = pair.wait_until_completed(COMPLETE_SECONDS)
    pair.mend()
    return seconds


def lose_cut_off_briefly(pair: Pair) -> float:
    """No packet passes until before it is given up."""
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
    """Loses the second machine while both are at work, and has it work again.

    Gives the seconds from the fault, or of a short one from its end, until all images were completed.
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
    # That it works again shows when more is done at once than the other one can do.
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
    """A place for files and index, in a folder or in a bucket whose keys are then in our environment."""
    if is_folder:
        with tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as folder:
            yield folder
        return
    with s3_bucket() as environment:
        os.environ.update(environment)
        yield "s3://images/machines"


def main() -> None:
    """Goes through all faults on one pair of machines."""
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
