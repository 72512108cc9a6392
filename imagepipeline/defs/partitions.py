"""The one set of partitions: an image ID each, added when its upload is taken in."""

import dagster as dg

uploads = dg.DynamicPartitionsDefinition(name="uploads")
