"""A preload that cannot be imported."""

raise ImportError("no such thing")
