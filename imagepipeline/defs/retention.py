"""Retention: what Dagster and the ledger forget of images that have ended.

An image's row, history, files and vector stay. What Dagster has of it is a copy that takes 30 times
as much room, and its UI shows a few thousand partitions well and a hundred thousand never.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from threading import Lock

import dagster as dg

from imagepipeline.dagster_records import DagsterRecords
from imagepipeline.defs.batches import apply_plan, process_batch
from imagepipeline.defs.jobs import process_upload
from imagepipeline.errors import PostponedError
from imagepipeline.stores.outbox import WINDOW
from imagepipeline.stores.retention import AS_SUMMARY, GONE, WITH_RUNS, Ended, Retention

IMAGES_AT_ONCE = 50  # looked up at once; each is pruned by itself
ROWS_AT_ONCE = 500
INTERVAL_SECONDS, TICK_SECONDS = 30, 10  # a third of one core at most
OF_MANY = (process_batch.name, apply_plan.name)  # jobs whose runs are not about one image
OF_ONE = (process_upload.name, "__ASSET_JOB")  # the latter: runs that a person starts
# One prune at a time in this process; two processes do no harm, as each image is held.
_pruning = Lock()


@dataclass(frozen=True)
class Kept:
    """What is kept: days, and a number of images in Dagster; 0 keeps all.

    `channels` are those that must have sent a notice before it is deleted.
    """

    runs_days: float
    partitions: int
    partitions_days: float
    calls_days: float
    notices_days: float
    channels: Collection[str]


@dataclass
class Pruned:
    """What was pruned, or would be.

    Attributes:
        partitions: images that left Dagster, with their runs and events.
        summaries: images whose runs were replaced by a summary of their results.
        runs: other old runs that were removed, with their events: of many images, or of an image
            that later runs have taken, too. The latter are not counted in a dry run.
        reports: events of sensors, such as how long the queue was; not counted in a dry run.
        calls: rows of paid calls; their sums stay.
        notices: sent notices.
        waits_because: why images wait to be pruned, or empty.
    """

    partitions: int = 0
    summaries: int = 0
    runs: int = 0
    reports: int = 0
    calls: int = 0
    notices: int = 0
    waits_because: str = ""

    @property
    def total(self) -> int:
        """How much was pruned."""
        counts = (self.partitions, self.summaries, self.runs, self.reports)
        return sum(counts) + self.calls + self.notices


@dataclass(frozen=True)
class Pruner:
    """Prunes what is no longer kept, in small steps that may be interrupted anywhere.

    Args:
        retention: knows which images Dagster has.
        kept: what is kept.
    """

    retention: Retention
    kept: Kept

    def plan(self, instance: dg.DagsterInstance) -> Pruned:
        """What there is to prune; changes nothing."""
        kept, retention, records = self.kept, self.retention, DagsterRecords(instance)
        planned = Pruned(waits_because=_explain_wait(records))
        if kept.partitions:
            planned.partitions = max(0, retention.count_in_dagster() - kept.partitions)
        if before := self._find_cutoff(kept.partitions_days):
            old = retention.count_before(before, (WITH_RUNS, AS_SUMMARY))
            planned.partitions = max(planned.partitions, old)
        if before := self._find_cutoff(kept.runs_days):
            old = retention.count_before(before, (WITH_RUNS,))
            planned.summaries = max(0, old - planned.partitions)
            planned.runs = sum(records.count_finished(name, before) for name in OF_MANY)
        if before := self._find_cutoff(kept.calls_days):
            planned.calls = retention.count_calls(before)
        if before := self._find_cutoff(kept.notices_days):
            planned.notices = retention.count_notices(before, kept.channels)
        return planned

    def prune(self, instance: dg.DagsterInstance, seconds: float = float("inf")) -> Pruned:
        """Prunes until nothing is left or that time is over.

        Raises:
            PostponedError: the catalogue does not answer; what was pruned stays so.
        """
        until = time.monotonic() + seconds
        records = DagsterRecords(instance)
        done = Pruned()

        def repeat(step: Callable[[], int]) -> int:
            """Repeats a step until it does nothing; returns how much it did."""
            total = 0
            while time.monotonic() < until and (count := step()):
                total += count
            return total

        done.calls = repeat(self._prune_calls)
        done.notices = repeat(self._prune_notices)
        done.partitions = repeat(lambda: self._prune_partitions(records, until))
        done.summaries = repeat(lambda: self._prune_runs_of_images(records, until))
        done.waits_because = _explain_wait(records)
        done.runs = repeat(lambda: self._prune_other_runs(records))
        done.reports = repeat(lambda: self._prune_reports(records))
        return done

    def _prune_partitions(self, records: DagsterRecords, until: float) -> int:
        kept = self.kept
        images: dict[str, Ended] = {}
        if kept.partitions:
            excess = self.retention.count_in_dagster() - kept.partitions
            if excess > 0:
                oldest = self.retention.list_oldest(min(excess, IMAGES_AT_ONCE))
                images |= {image.image_id: image for image in oldest}
        if before := self._find_cutoff(kept.partitions_days):
            oldest = self.retention.list_oldest(IMAGES_AT_ONCE, before=before)
            images |= {image.image_id: image for image in oldest}
        return sum(self._remove(records, image, until) for image in images.values())

    def _prune_runs_of_images(self, records: DagsterRecords, until: float) -> int:
        before = self._find_cutoff(self.kept.runs_days)
        if before is None:
            return 0
        oldest = self.retention.list_oldest(IMAGES_AT_ONCE, (WITH_RUNS,), before)
        return sum(self._summarize(records, image, until) for image in oldest)

    def _remove(self, records: DagsterRecords, image: Ended, until: float) -> bool:
        """Removes an image from Dagster, unless it is at work again or the time is over."""
        if records.is_backfilling() or records.has_unfinished_runs(image.image_id):
            return False
        # Before the image is held: all that write would wait meanwhile.
        if not records.thin_runs(image.image_id, until):
            return False
        with self.retention.holding(image, GONE) as is_held:
            if is_held:
                records.remove_runs(image.image_id)
                records.remove_events(image.image_id)
                records.remove_partition(image.image_id)
                # A person may have started a run from the UI in this moment.
                if records.has_unfinished_runs(image.image_id):
                    records.add_partition(image.image_id)
        return is_held

    def _summarize(self, records: DagsterRecords, image: Ended, until: float) -> bool:
        """Removes an image's runs, and keeps a short form of their results."""
        if records.is_backfilling() or records.has_unfinished_runs(image.image_id):
            return False
        if not records.thin_runs(image.image_id, until):
            return False
        with self.retention.holding(image, AS_SUMMARY) as is_held:
            if is_held:
                records.detach(image.image_id)
                records.remove_runs(image.image_id)
        return is_held

    def _prune_other_runs(self, records: DagsterRecords) -> int:
        """Removes old runs of many images, and those of images that later runs have taken."""
        before = self._find_cutoff(self.kept.runs_days)
        if before is None:
            return 0
        names = OF_MANY if records.is_backfilling() else (*OF_MANY, *OF_ONE)
        found = [
            run_id
            for name in names
            for run_id in records.list_finished(name, before, IMAGES_AT_ONCE)
        ]
        for run_id in found:
            records.remove_run_without_results(run_id)
        return len(found)

    def _prune_reports(self, records: DagsterRecords) -> int:
        before = self._find_cutoff(self.kept.runs_days)
        return records.prune_reports(before, ROWS_AT_ONCE) if before else 0

    def _prune_calls(self) -> int:
        before = self._find_cutoff(self.kept.calls_days)
        return self.retention.prune_calls(before, ROWS_AT_ONCE) if before else 0

    def _prune_notices(self) -> int:
        before = self._find_cutoff(self.kept.notices_days)
        if before is None:
            return 0
        before = min(before, self.retention.clock() - WINDOW)  # until then it may be sent
        return self.retention.prune_notices(before, self.kept.channels, ROWS_AT_ONCE)

    def _find_cutoff(self, days: float) -> datetime | None:
        """The time before which something is not kept; None if all is kept."""
        return self.retention.clock() - timedelta(days=days) if days else None


def _explain_wait(records: DagsterRecords) -> str:
    return "a backfill is under way, which may need any partition" * records.is_backfilling()


@dg.sensor(minimum_interval_seconds=INTERVAL_SECONDS, default_status=dg.DefaultSensorStatus.RUNNING)
def prune_sensor(
    context: dg.SensorEvaluationContext, pruner: dg.ResourceParam[Pruner]
) -> dg.SkipReason:
    """Forgets what is old: runs, events, partitions beyond the newest, sent notices, old calls.

    Rows, history, files and vectors of images stay, and so do the sums of costs. At most ten
    seconds at a time. What is kept is set by IMAGEPIPELINE_KEEP_…; `imagepipeline prune` does the
    same at once.
    """
    if not _pruning.acquire(blocking=False):
        return dg.SkipReason("An earlier tick is still at work.")
    try:
        done = pruner.prune(context.instance, TICK_SECONDS)
    except PostponedError as error:
        return dg.SkipReason(str(error))
    finally:
        _pruning.release()
    wait = f" Images wait: {done.waits_because}." if done.waits_because else ""
    if not done.total:
        return dg.SkipReason(f"Nothing to prune.{wait}")
    return dg.SkipReason(
        f"Pruned {done.partitions} partitions, runs of {done.summaries} images, {done.runs} other "
        f"runs, {done.reports} reports, {done.calls} calls and {done.notices} notices.{wait}"
    )
