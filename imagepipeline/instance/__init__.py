"""Dagster's instance: its storages, and commands on what they hold, each a process of its own."""
