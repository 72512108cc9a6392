"""A check of your own on an asset of the pipeline: has each image enough tags to be found?

    PYTHONPATH=examples IMAGEPIPELINE_DEFINITIONS=own_checks imagepipeline up

It runs with every upload, and its results are in the Dagster UI beside those of our own checks.
Assets, sensors and schedules of your own are added in the same way.
"""

import dagster as dg

from imagepipeline import definitions
from imagepipeline.defs.partitions import uploads
from imagepipeline.stores.catalogue import Catalogue

MIN_TAGS = 3


@dg.asset_check(asset="metadata", partitions_def=uploads)
def has_enough_tags(
    context: dg.AssetCheckExecutionContext, catalogue: dg.ResourceParam[Catalogue]
) -> dg.AssetCheckResult:
    """Each image has three tags or more."""
    row = catalogue.get(context.partition_key)
    tags = row["metadata"]["tags"] if row and row["metadata"] else []
    return dg.AssetCheckResult(
        passed=len(tags) >= MIN_TAGS,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"tags": ", ".join(tags)},
    )


@dg.definitions
def defs() -> dg.Definitions:
    """The pipeline, and this check beside it."""
    return dg.Definitions.merge(definitions.defs(), dg.Definitions(asset_checks=[has_enough_tags]))
