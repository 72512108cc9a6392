"""DagsterRecords: what a Dagster instance keeps of images, and how it is removed.

Dagster can wipe partitions and old events only in its hosted product. So some rows of its tables
are deleted here; nothing else in the package touches them.
"""

import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa
from dagster._core.events.log import EventLogEntry
from dagster._core.execution.backfill import (
    BULK_ACTION_TERMINAL_STATUSES,
    BulkActionsFilter,
    BulkActionStatus,
)
from dagster._core.storage.event_log import SqliteEventLogStorage
from dagster._core.storage.event_log.schema import (
    AssetCheckExecutionsTable,
    AssetEventTagsTable,
    SqlEventLogStorageTable,
)
from dagster._serdes import deserialize_value, serialize_value

from imagepipeline.models import ASSETS

PARTITIONS = "uploads"  # the name of the partitions, whose keys are image IDs
PARTITION_TAG = "dagster/partition"
OF_IMAGES = ("original", *ASSETS)  # the assets that have a partition for each image
UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
FINISHED = [
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
]
FEW_RUNS = 20  # removing one takes about 30 ms
# What a materialization keeps when its run is removed; the rest is in the catalogue.
KEPT_METADATA = {
    *("status", "reason", "error", "next", "waits_because", "flaw", "problems"),
    *("description", "tags", "category", "cost_usd", "bytes_out", "restored", "see_original"),
}
# The events that name a partition.
OF_PARTITIONS = (
    dg.DagsterEventType.ASSET_MATERIALIZATION,
    dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    dg.DagsterEventType.ASSET_OBSERVATION,
    dg.DagsterEventType.ASSET_FAILED_TO_MATERIALIZE,
)
OF_SENSORS = ("queue", "index", "outdated")  # the assets that sensors report without a run
EVENTS, CHECKS = SqlEventLogStorageTable.c, AssetCheckExecutionsTable.c


class DagsterRecords:
    """What a Dagster instance keeps of images: runs, events and partitions."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self._storage: Any = instance.event_log_storage

    def is_backfilling(self) -> bool:
        """Whether a backfill has not ended: it may be about any partition."""
        unended = [one for one in BulkActionStatus if one not in BULK_ACTION_TERMINAL_STATUSES]
        return bool(self.instance.get_backfills_count(BulkActionsFilter(statuses=unended)))

    def count_runs(self, image_id: str) -> int:
        """The number of an image's runs."""
        return self.instance.get_runs_count(dg.RunsFilter(tags={PARTITION_TAG: image_id}))

    def has_unfinished_runs(self, image_id: str) -> bool:
        """Whether one of an image's runs has not ended."""
        unfinished = dg.RunsFilter(tags={PARTITION_TAG: image_id}, statuses=UNFINISHED)
        return bool(self.instance.get_runs(unfinished, limit=1))

    def remove_runs(self, image_id: str) -> int:
        """Removes an image's finished runs with all their events; returns their number."""
        finished = dg.RunsFilter(tags={PARTITION_TAG: image_id}, statuses=FINISHED)
        runs = self.instance.get_runs(finished)
        for run in runs:
            self.remove_run(run.run_id)
        return len(runs)

    def thin_runs(self, image_id: str, until: float) -> bool:
        """Removes the oldest of an image's finished runs, if there are many; its results stay.

        Returns:
            Whether few are left; False if it was `until`, by the monotonic clock, before.
        """
        finished = dg.RunsFilter(tags={PARTITION_TAG: image_id}, statuses=FINISHED)
        while (excess := self.instance.get_runs_count(finished) - FEW_RUNS) > 0:
            if time.monotonic() >= until:
                return False
            limit = min(excess, FEW_RUNS)
            for run in self.instance.get_runs(finished, limit=limit, ascending=True):
                self.remove_run_without_results(run.run_id)
        return True

    def list_finished(self, job_name: str, before: datetime, limit: int) -> list[str]:
        """The IDs of up to `limit` runs of a job that ended before then, oldest first."""
        finished = dg.RunsFilter(job_name=job_name, statuses=FINISHED, updated_before=before)
        records = self.instance.get_run_records(finished, limit, ascending=True)
        return [record.dagster_run.run_id for record in records]

    def count_finished(self, job_name: str, before: datetime) -> int:
        """How many runs of a job ended before then."""
        return self.instance.get_runs_count(
            dg.RunsFilter(job_name=job_name, statuses=FINISHED, updated_before=before)
        )

    def remove_run(self, run_id: str) -> None:
        """Removes a run, its events, its captured output and, if it has one, its own database."""
        self.instance.compute_log_manager.delete_logs(prefix=[run_id])
        self.instance.delete_run(run_id)
        if isinstance(self._storage, SqliteEventLogStorage):
            path = Path(self._storage.path_for_shard(run_id))
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)

    def remove_partition(self, image_id: str) -> None:
        """Removes an image's partition from the list; its events go with `remove_events`."""
        self.instance.delete_dynamic_partition(PARTITIONS, image_id)

    def has_partition(self, image_id: str) -> bool:
        """Whether an image is on the list; it is not if Dagster's backup was older than its row."""
        return self.instance.has_dynamic_partition(PARTITIONS, image_id)

    def add_partition(self, image_id: str) -> None:
        """Adds an image's partition to the list; does nothing if it is there."""
        self.instance.add_dynamic_partitions(PARTITIONS, [image_id])

    def detach(self, image_id: str) -> None:
        """Shortens the newest materialization of each asset of an image, and frees it of its run.

        It keeps its number, time and tags, so that the run can be removed and the UI still knows
        what is materialized. Others of the image, outside its own runs, are removed.
        """
        newest: dict[str, int] = {}
        found = self._list_events(image_id)
        for event in found:
            if event.dagster_event_type == dg.DagsterEventType.ASSET_MATERIALIZATION.value:
                newest[event.asset_key] = max(event.id, newest.get(event.asset_key, 0))
        kept = set(newest.values())
        with self._storage.index_connection() as connection:
            _free(connection, kept)
            _delete(connection, [event.id for event in found if event.id not in kept])

    def remove_run_without_results(self, run_id: str) -> None:
        """Removes a run; what it made last of any image stays as `detach` does it.

        A later run may have made only some of an image's results anew, or none.
        """
        later = sa.alias(SqlEventLogStorageTable).c
        is_newer = (
            (later.asset_key == EVENTS.asset_key)
            & (later.dagster_event_type == EVENTS.dagster_event_type)
            & (later.partition == EVENTS.partition)
            & (later.id > EVENTS.id)
        )
        newest = sa.select(EVENTS.id).where(
            EVENTS.run_id == run_id,
            EVENTS.dagster_event_type == dg.DagsterEventType.ASSET_MATERIALIZATION.value,
            EVENTS.partition.is_not(None),
            ~sa.exists().where(is_newer),
        )
        with self._storage.index_connection() as connection:
            _free(connection, connection.execute(newest).scalars().all())
        self.remove_run(run_id)

    def remove_events(self, image_id: str, is_logged: bool = False) -> None:
        """Removes an image's events outside its own runs: in batches, and without a run.

        With `is_logged` also the lines about it in the logs of batches, which reads all of them.
        """
        found = self._list_events(image_id)
        with self._storage.index_connection() as connection:
            _delete(connection, [event.id for event in found])
            batches = {event.run_id for event in found} - {""}
            if is_logged and batches:
                # Lines of a batch's log begin with the ID of their image.
                lines = [f'"user_message": "{image_id}{mark}' for mark in (" ", ":")]
                # Not LIKE, for which `_` is any character, and on SQLite `a` is `A`.
                has_line = (
                    sa.func.replace(EVENTS.event, line, "") != EVENTS.event for line in lines
                )
                connection.execute(
                    sa.delete(SqlEventLogStorageTable).where(
                        EVENTS.run_id.in_(batches), sa.or_(*has_line)
                    )
                )

    def prune_reports(self, before: datetime, limit: int) -> int:
        """Removes up to `limit` of what sensors reported before then; returns their number.

        The latest result of each check stays.
        """
        before = before.astimezone(UTC).replace(tzinfo=None)  # as Dagster stores it
        kinds = [
            sa.and_(
                EVENTS.asset_key == dg.AssetKey(name).to_string(),
                EVENTS.dagster_event_type == dg.DagsterEventType.ASSET_MATERIALIZATION.value,
            )
            for name in OF_SENSORS
        ]
        kinds.append(EVENTS.dagster_event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION.value)
        removed = 0
        with self._storage.index_connection() as connection:
            for kind in kinds:
                oldest = (
                    sa.select(EVENTS.id, EVENTS.timestamp)
                    .where(kind)
                    .order_by(EVENTS.id)
                    .limit(limit)
                )
                rows = connection.execute(oldest).all()
                numbers = [row.id for row in rows if row.timestamp < before]
                _delete(connection, numbers)
                removed += len(numbers)
            newest = sa.select(sa.func.max(CHECKS.id)).group_by(CHECKS.asset_key, CHECKS.check_name)
            old = (
                sa.select(CHECKS.id)
                .where(CHECKS.create_timestamp < before, CHECKS.id.not_in(newest))
                .limit(limit)
            )
            results = connection.execute(old).scalars().all()
            connection.execute(sa.delete(AssetCheckExecutionsTable).where(CHECKS.id.in_(results)))
        return removed + len(results)

    def _list_events(self, image_id: str) -> Sequence[sa.Row[Any]]:
        """Number, run, type and asset of each event that names an image's partition.

        There is an index on asset, type and partition, and none on partition alone.
        """
        of_image = sa.and_(
            EVENTS.asset_key.in_([dg.AssetKey(name).to_string() for name in OF_IMAGES]),
            EVENTS.dagster_event_type.in_([kind.value for kind in OF_PARTITIONS]),
            EVENTS.partition == image_id,
        )
        columns = (EVENTS.id, EVENTS.run_id, EVENTS.dagster_event_type, EVENTS.asset_key)
        with self._storage.index_connection() as connection:
            found: Sequence[sa.Row[Any]] = connection.execute(
                sa.select(*columns).where(of_image)
            ).all()
        return found


def _free(connection: sa.Connection, numbers: Iterable[int]) -> None:
    """Shortens materializations, and frees them of their run."""
    for number in sorted(numbers):
        stored = connection.execute(sa.select(EVENTS.event).where(EVENTS.id == number))
        connection.execute(
            sa.update(SqlEventLogStorageTable)
            .where(EVENTS.id == number)
            .values(run_id="", event=_shorten(stored.scalar_one()))
        )


def _delete(connection: sa.Connection, numbers: Sequence[int]) -> None:
    """Deletes events and their tags."""
    connection.execute(
        sa.delete(AssetEventTagsTable).where(AssetEventTagsTable.c.event_id.in_(numbers))
    )
    connection.execute(sa.delete(SqlEventLogStorageTable).where(EVENTS.id.in_(numbers)))


def _shorten(stored: str) -> str:
    """A stored materialization without its run and most of its metadata."""
    entry = deserialize_value(stored, EventLogEntry)
    event: Any = entry.dagster_event
    data = event.event_specific_data
    made: dg.AssetMaterialization = data.materialization
    metadata = {name: value for name, value in made.metadata.items() if name in KEPT_METADATA}
    data = data._replace(materialization=made._replace(metadata=metadata))
    event = event._replace(event_specific_data=data, step_handle=None, logging_tags={})
    return serialize_value(entry._replace(run_id="", dagster_event=event))
