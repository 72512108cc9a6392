"""Starts and runs the pipeline's processes: services, supervisor and a local Valkey server."""
