"""Everything Dagster and nothing else: thin wrappers that read, call, store and report."""
