"""Recovery from crashes: images whose run is gone, runs that died early, runs without an image.

Only the reconciler recovers (docs/decisions/0005-the-reconciler-owns-recovery.md). It compares the
catalogue with Dagster's runs, and changes a row only under the fence it has read, so that a late
tick does no harm.
"""

import math
import time
from collections.abc import Callable, Hashable
from functools import partial

import dagster as dg

from imagepipeline.defs.attempts import CANCELLED_STATUSES, GENERATION_TAG, read_generation
from imagepipeline.defs.batches import process_batch
from imagepipeline.defs.jobs import process_upload
from imagepipeline.defs.outcomes import build_outcome, report_outcome
from imagepipeline.defs.sharing import choose
from imagepipeline.errors import PostponedError, StaleClaimError
from imagepipeline.stores.broker import TaskQueue
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.reader import Pending, Processing
from imagepipeline.text import make_printable

INTERVAL_SECONDS = 15
STALL_SECONDS = 45  # more than four beats of a living run
UNCLAIMED_SECONDS = 45  # a run starts within 1 s, or 9 s if five start at once on two cores
MAX_PENDING_CHECKED = 50
RENEWAL_WAITS_SECONDS = (1, 5, 30, 120)  # for runs that repeatedly end before they claim
CANCELLED = "its run was cancelled before it began"
JOB_NAMES = (process_upload.name, "__ASSET_JOB")  # the latter: runs that a person starts
CANCELLABLE = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
]
# A run is NOT_STARTED for milliseconds, or for ever: if Dagster's database dies in a tick between
# creating a run and queueing it, nobody queues it later.
WITHOUT_AN_IMAGE_AT_FIRST = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


class StandstillWatch:
    """Measures how long values have not changed, by a monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[Hashable, tuple[object, float]] = {}

    def measure_seconds(self, key: Hashable, value: object) -> float:
        """For how long `key` has had this value."""
        known = self._seen.get(key)
        if known is None or known[0] != value:
            known = self._seen[key] = (value, self._clock())
        return self._clock() - known[1]

    def forget_all_but(self, keys: set[Hashable]) -> None:
        """Drops all other keys."""
        self._seen = {key: seen for key, seen in self._seen.items() if key in keys}


# Kept between ticks by the code server's process; if it is lost, the measurement starts again.
watch = StandstillWatch()


@dg.sensor(minimum_interval_seconds=INTERVAL_SECONDS, default_status=dg.DefaultSensorStatus.RUNNING)
def reconciler(
    context: dg.SensorEvaluationContext,
    catalogue: dg.ResourceParam[Catalogue],
    tasks: dg.ResourceParam[TaskQueue],
) -> dg.SkipReason:
    """Repairs what crashes leave behind, every 15 s, and logs each repair.

    An image whose run is gone becomes pending again; the third time it fails as `poison`. A run
    that holds no image is ended, which frees its slot, and so is one that was never queued.
    """
    try:
        lines = reconcile(catalogue, context.instance, tasks, watch)
    except PostponedError as error:
        return dg.SkipReason(str(error))
    for line in lines:
        context.log.warning(line)
    return dg.SkipReason(f"{len(lines)} repaired." if lines else "Nothing to repair.")


def reconcile(
    catalogue: Catalogue, instance: dg.DagsterInstance, tasks: TaskQueue, watch: StandstillWatch
) -> list[str]:
    """Checks everything once; returns a log line for each repair."""
    processing = catalogue.list_processing()
    watched: set[Hashable] = set()
    lines = []
    for row in processing:
        watched.add((row.image_id, row.fence))
        repaired = _look_at(
            row.image_id, partial(_recover_if_lost, catalogue, instance, watch, row)
        )
        if repaired:
            _look_at(row.image_id, partial(_show_outcome, catalogue, instance, row))
        lines += repaired
    idle = _list_idle_runs(instance, owners={row.run_id for row in processing})
    lines += _cancel_runs(catalogue, instance)
    waiting = tasks.list_waiting() if idle else set()
    for run in idle:
        watched.add(run.run_id)
        if run.run_id in waiting:  # for a worker, or for a free slot
            watch.measure_seconds(run.run_id, "waits for a worker")
        elif watch.measure_seconds(run.run_id, "holds no image") >= UNCLAIMED_SECONDS:
            is_queued = run.status != dg.DagsterRunStatus.NOT_STARTED
            cause = "it held a slot and no image" if is_queued else "it was never queued"
            end_run(instance, run, cause)
            lines.append(f"Run {run.run_id} was ended: {cause}.")
    watch.forget_all_but(watched)
    # Last, so that an image whose run was just ended need not wait for the next tick.
    # Of each tenant, as the sensor chooses them.
    anyone = partial(choose, catalogue, MAX_PENDING_CHECKED, {}, lambda _: math.inf, set())
    next_ones, next_pictures = anyone(), anyone(has_no_variants=True)
    # In a pause, the sensor tries the one that waits longest.
    tried = choose(catalogue, 1, {}, lambda _: math.inf, set(), is_rotating=True)
    for pending in dict.fromkeys((*next_ones, *next_pictures, *tried)):
        lines += _look_at(
            pending.image_id, partial(_renew_if_run_ended, catalogue, instance, pending)
        )
    return lines


def _cancel_runs(catalogue: Catalogue, instance: dg.DagsterInstance) -> list[str]:
    """Cancels the unfinished runs of images that were cancelled on the command line."""
    records = instance.get_run_records(dg.RunsFilter(statuses=CANCELLABLE))
    runs = {
        record.dagster_run.run_id: record.dagster_run
        for record in records
        if "dagster/partition" in record.dagster_run.tags
    }
    found = catalogue.find_cancelled([run.tags["dagster/partition"] for run in runs.values()])
    lines = []
    for run_id, run in runs.items():
        image_id = run.tags["dagster/partition"]
        image = found.get(image_id)
        generation = read_generation(run.tags)
        if image is None or (image.run_id != run_id and image.generation != generation):
            continue
        instance.report_engine_event(f"{image_id} was cancelled: {image.error}.", run)
        if instance.run_coordinator.cancel_run(run_id):  # as the UI does
            lines.append(f"Run {run_id} was cancelled: {image_id} was cancelled.")
    return lines


def _list_idle_runs(instance: dg.DagsterInstance, owners: set[str]) -> list[dg.DagsterRun]:
    """The runs that should hold an image by now or soon, and hold none."""
    records = instance.get_run_records(dg.RunsFilter(statuses=WITHOUT_AN_IMAGE_AT_FIRST))
    runs = [record.dagster_run for record in records if record.dagster_run.run_id not in owners]
    return [
        run
        for run in runs
        if run.job_name == process_batch.name
        or (run.job_name in JOB_NAMES and "dagster/partition" in run.tags)
    ]


def _look_at(image_id: str, work: Callable[[], list[str]]) -> list[str]:
    """The repairs of one image; an error in it does not stop the others."""
    try:
        return work()
    except PostponedError:  # concerns all images
        raise
    except Exception as error:
        return [
            f"{image_id!r:.80} could not be checked: "
            + make_printable(f"{type(error).__name__}: {error}")[:200]
        ]


def _show_outcome(catalogue: Catalogue, instance: dg.DagsterInstance, row: Processing) -> list[str]:
    if run := instance.get_run_by_id(row.run_id):
        report_outcome(instance, run, build_outcome(catalogue, row.image_id))
    return []


def _recover_if_lost(
    catalogue: Catalogue, instance: dg.DagsterInstance, watch: StandstillWatch, row: Processing
) -> list[str]:
    """Recovers a processing image whose run has ended, was deleted, or stands still."""
    run = instance.get_run_by_id(row.run_id)
    seconds = watch.measure_seconds((row.image_id, row.fence), row.beat)
    if run is None:
        cause = "its run was deleted"
    elif run.is_finished:
        cause = "its run ended without a result"
    elif seconds >= STALL_SECONDS:
        cause = f"its run stood still for {seconds:.0f} s"
    else:
        return []
    try:
        if run is not None and run.status in CANCELLED_STATUSES:
            catalogue.fail(row.claim, "cancelled", f"run {row.run_id} was cancelled")
            line = f"{row.image_id} has failed: its run {row.run_id} was cancelled."
        else:
            status = catalogue.recover(row.claim, cause)
            line = f"{row.image_id} was recovered and is {status}: {cause} (run {row.run_id})."
    except StaleClaimError:  # it ended or was taken over meanwhile
        return []
    if run is not None and not run.is_finished:
        end_run(instance, run, cause)
    return [line]


def _renew_if_run_ended(
    catalogue: Catalogue, instance: dg.DagsterInstance, pending: Pending
) -> list[str]:
    """Renews a pending image whose run ended before it claimed the image: its run key is used."""
    tags = {"dagster/partition": pending.image_id, GENERATION_TAG: str(pending.generation)}
    runs = [run for run in instance.get_runs(dg.RunsFilter(tags=tags)) if run.parent_run_id is None]
    if not runs or not all(run.is_finished for run in runs):
        return []
    if runs[0].status == dg.DagsterRunStatus.CANCELED:
        is_changed, what = (
            catalogue.fail_pending(pending, "cancelled", CANCELLED),
            f"failed: {CANCELLED}",
        )
    else:
        wait_seconds = RENEWAL_WAITS_SECONDS[
            min(catalogue.count_renewals(pending), len(RENEWAL_WAITS_SECONDS) - 1)
        ]
        is_changed = catalogue.renew(
            pending, f"run {runs[0].run_id} ended before it began", wait_seconds
        )
        what = f"requested again in {wait_seconds} s: its run ended before it began"
    return [f"{pending.image_id} is {what} (run {runs[0].run_id})."] if is_changed else []


def end_run(instance: dg.DagsterInstance, run: dg.DagsterRun, cause: str) -> None:
    """Frees the slot of a run that is lost.

    Its process is not asked to stop: asking a frozen one would block the whole code server, and a
    live one finds its claim gone at its next write and ends by itself.
    """
    # The process of a cancelled run may be frozen or dead: it still ends as cancelled.
    is_cancelled = run.status in CANCELLED_STATUSES
    report = instance.report_run_canceled if is_cancelled else instance.report_run_failed
    report(run, f"Ended by the reconciler: {cause}.")
