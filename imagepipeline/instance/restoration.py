"""Brings images back to Dagster that have left it.

    python -m imagepipeline.instance.restoration [--dry-run] ID…

Prints one line of JSON: a list of `id`, `is_known` and `outcome`. This is a separate process so
that the command line need not import Dagster.
"""

import json
import sys
from contextlib import closing

import dagster as dg

from imagepipeline.dagster_records import DagsterRecords
from imagepipeline.defs.restoring import restore
from imagepipeline.errors import ImagePipelineError
from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.retention import Retention

DRY_RUN = "--dry-run"


def main() -> None:
    """Restores the images in the arguments.

    Raises:
        SystemExit: one could not be restored.
    """
    url = Settings.load().database_url
    image_ids = [argument for argument in sys.argv[1:] if argument != DRY_RUN]
    with dg.DagsterInstance.get() as instance, closing(Catalogue(url)) as catalogue:
        try:
            rows = [
                restore_one(instance, catalogue, Retention(url), image_id) for image_id in image_ids
            ]
        except ImagePipelineError as error:
            sys.exit(str(error))
    print(json.dumps(rows))


def restore_one(
    instance: dg.DagsterInstance, catalogue: Catalogue, retention: Retention, image_id: str
) -> dict[str, str | bool]:
    """Restores an image if it is gone, and says what became of it."""
    row = catalogue.get(image_id)
    if row is None:
        outcome = "unknown: it is not in the catalogue"
    elif row["in_dagster"] is not None and DagsterRecords(instance).has_partition(image_id):
        outcome = "left alone: Dagster has it"
    elif DRY_RUN in sys.argv:
        outcome = "would be restored"
    else:
        # First, so that it is pruned again even if this process is killed before the end.
        retention.note_restored(image_id)
        restore(instance, catalogue, image_id)
        outcome = "restored"
    return {"id": image_id, "is_known": row is not None, "outcome": outcome}


if __name__ == "__main__":
    main()
