"""The one job: an upload, from original to searchable."""

import dagster as dg

from imagepipeline.defs.assets import embedding, metadata, variants
from imagepipeline.defs.checks import variant_checks

process_upload = dg.define_asset_job(
    "process_upload",
    selection=dg.AssetSelection.assets(metadata, variants, embedding)
    - dg.AssetSelection.checks(variant_checks),  # it is about all images; others' may be about one
    description="Describes an upload, renders its variants and makes it searchable. The sensor "
    "starts one run for each upload.",
    # One process for all steps: another costs 2 CPU seconds a step, and spins while a retry waits.
    executor_def=dg.in_process_executor,
)
