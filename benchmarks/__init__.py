"""Benchmarks of the pipeline, some of them against a reference worker; see docs/performance.md."""
