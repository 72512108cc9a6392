"""The partitions: one for each image ID, added by the ingest."""

import dagster as dg

uploads = dg.DynamicPartitionsDefinition(name="uploads")
