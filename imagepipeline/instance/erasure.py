"""Erases images: what Dagster knows of them, and by `imagepipeline.erasing` all else.

    python -m imagepipeline.instance.erasure [--dry-run] ID…

Prints one line of JSON, the list of receipts. This is a separate process so that the command line
need not import Dagster.
"""

import json
import sys
import time
from contextlib import closing

import dagster as dg

from imagepipeline import erasing
from imagepipeline.dagster_records import PARTITION_TAG, UNFINISHED, DagsterRecords
from imagepipeline.errors import ImagePipelineError, StackError
from imagepipeline.instance import sqlite_storage
from imagepipeline.providers import build_recipes
from imagepipeline.settings import Settings
from imagepipeline.storage import open_storage
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.erasures import Erasures
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline.stores.vectors import EmbeddingIndex

DRY_RUN = "--dry-run"
END_SECONDS = 90  # the reconciler ends the run of a lost worker within a minute
POLL_SECONDS = 0.3


class Dagster(DagsterRecords):
    """What a Dagster instance knows of images; see `erasing.Orchestrator`."""

    def end_runs(self, image_id: str) -> None:
        """See `Orchestrator.end_runs`."""
        unfinished = dg.RunsFilter(tags={PARTITION_TAG: image_id}, statuses=UNFINISHED)
        deadline = time.monotonic() + END_SECONDS
        asked: set[str] = set()
        while runs := self.instance.get_runs(unfinished):
            for run in runs:
                if run.run_id not in asked and run.status != dg.DagsterRunStatus.CANCELING:
                    self.instance.run_coordinator.cancel_run(run.run_id)  # as the UI does
                    asked.add(run.run_id)
            if time.monotonic() > deadline:
                raise StackError(
                    f"run {runs[0].run_id} of {image_id} does not end: see `imagepipeline doctor`, "
                    "then erase the image again"
                )
            time.sleep(POLL_SECONDS)

    def remove(self, image_id: str) -> int:
        """See `Orchestrator.remove`."""
        count = self.remove_runs(image_id)
        self.remove_events(image_id, is_logged=True)
        self._replace_latest(image_id)
        self.remove_partition(image_id)
        return count

    def _replace_latest(self, image_id: str) -> None:
        """Replaces the copy of its latest materialization that Dagster keeps with each asset.

        Deleting a run or an event leaves that copy.
        """
        for record in self.instance.get_asset_records():
            latest = record.asset_entry.last_materialization_record
            if latest is None or latest.partition_key != image_id:
                continue
            key = record.asset_entry.asset_key
            earlier = self.instance.fetch_materializations(key, limit=1).records
            if earlier:
                self.instance.event_log_storage.store_asset_event(  # type: ignore[attr-defined]
                    earlier[0].event_log_entry, earlier[0].storage_id
                )
            else:
                self.instance.wipe_assets([key])


def main() -> None:
    """Erases the images in the arguments, from the stores of the settings.

    Raises:
        SystemExit: they could not be erased.
    """
    settings = Settings.load()
    image_ids = [argument for argument in sys.argv[1:] if argument != DRY_RUN]
    with (
        dg.DagsterInstance.get() as instance,
        closing(Catalogue(settings.database_url)) as catalogue,
        closing(UploadQueue(settings.redis_url, settings.queue_prefix)) as queue,
    ):
        stores = erasing.Stores(
            catalogue,
            Erasures(settings.database_url),
            queue,
            open_storage(settings.storage),
            EmbeddingIndex(settings.index_uri),
            Dagster(instance),
            settings.specs,
            build_recipes(settings),
        )
        try:
            receipts = erasing.erase(stores, image_ids, DRY_RUN in sys.argv)
        except ImagePipelineError as error:
            sys.exit(str(error))
    is_emptied = DRY_RUN in sys.argv or sqlite_storage.truncate_logs()
    for receipt in receipts:
        if settings.dagster_database_url or settings.explicit_database_url:
            receipt.remains.append("deleted rows on disk, until Postgres has vacuumed its tables")
        if not is_emptied:
            receipt.remains.append("Dagster's write-ahead logs, until they are next emptied")
    print(json.dumps([receipt.to_dict() for receipt in receipts]))


if __name__ == "__main__":
    main()
