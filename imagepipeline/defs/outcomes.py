"""The asset `original`: each upload and what became of it, on one page of the UI."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
from dagster._core.events import StepMaterializationData

from imagepipeline.defs.partitions import uploads
from imagepipeline.defs.showing import (
    describe_metadata,
    link_to,
    show_picture,
    tabulate,
)
from imagepipeline.errors import explain_next
from imagepipeline.models import ASSETS, ImageMetadata, Status
from imagepipeline.stores.catalogue import Catalogue

ORIGINAL = dg.AssetKey("original")
STATUS_TAG = "imagepipeline/image_status"  # of runs after which the image is not completed
REASON_TAG = "imagepipeline/reason"  # of the failure or the wait

original_spec = dg.AssetSpec(
    ORIGINAL,
    deps=["queue"],
    partitions_def=uploads,
    group_name="images",
    owners=["team:imagepipeline"],
    kinds={"file"},
    description="""Each upload and what became of it.

Type an image ID into the filter of `Partitions` to see its `status`, why it failed or waits, the
picture, what was made of it, what it cost, and links to more. A partition is materialized at the
end of each run, also if the upload was rejected: then the file is at fault, not the pipeline, and
the run succeeds. `Runs` shows the reason of each failed image as a tag; docs/failures.md says what
to do about it.""",
)


def build_outcome(
    catalogue: Catalogue, image_id: str, thumbnail: str | None = None
) -> dg.AssetMaterialization:
    """The event that shows what became of an image, in the words of its row.

    Args:
        catalogue: has the row.
        image_id: of an image that a run has just ended with.
        thumbnail: a data URI; by default the placeholder is shown.

    Raises:
        PostponedError: the catalogue does not answer.
    """
    row = catalogue.get(image_id) or {}
    metadata = ImageMetadata.read(row.get("metadata"))
    facts = {
        "picture": show_picture(thumbnail or row.get("placeholder")),
        **(describe_metadata(metadata) if metadata else {}),
        "variants": tabulate(row.get("variants", []), row.get("original_bytes")),
        "width_px": row.get("width"),
        "height_px": row.get("height"),
        "bytes_in": row.get("original_bytes"),
        "flaw": row.get("flaw"),
        "cost_usd": catalogue.sum_cost_usd(image_id),
        "attempts": row.get("attempts"),
        "generation": row.get("generation"),
        "path": row.get("path") or row.get("requested_path"),
        "run": dg.MetadataValue.dagster_run(row["run_id"]) if row.get("run_id") else None,
        **{f"see_{asset}": link_to(asset, image_id) for asset in ASSETS},
    }
    known = {name: value for name, value in facts.items() if value is not None}
    return dg.AssetMaterialization(
        ORIGINAL, partition=image_id, metadata={**_describe_end(row), **known}
    )


def report_outcome(
    instance: dg.DagsterInstance, run: dg.DagsterRun, outcome: dg.AssetMaterialization
) -> None:
    """Records an outcome as an event of a run whose step has failed, or which is lost.

    Dagster drops what a failing step logs. An event without a run would outlive the image's
    erasure, which deletes its runs.
    """
    event = dg.DagsterEvent(
        dg.DagsterEventType.ASSET_MATERIALIZATION.value,
        job_name=run.job_name,
        event_specific_data=StepMaterializationData(outcome),
    )
    instance.report_dagster_event(event, run.run_id)


def _describe_end(row: Mapping[str, Any]) -> dict[str, str]:
    end = {"status": str(row.get("status"))}
    if end["status"] == Status.FAILED:
        retry = ", or open see_metadata and click Materialize"
        end |= {
            "reason": row["reason"],
            "error": row["error"],
            "next": explain_next(row["id"], row["reason"], retry),
        }
    elif end["status"] == Status.PENDING and row["history"][-1]["detail"]:
        end["waits_because"] = row["history"][-1]["detail"]
    return end
