"""Remote and local models: what an image shows, what a text means. No stores, no Dagster."""
