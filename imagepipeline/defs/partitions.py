"""The partitions: one for each image ID, added by the ingest."""

import dagster as dg

from imagepipeline.dagster_records import PARTITIONS

uploads = dg.DynamicPartitionsDefinition(name=PARTITIONS)
