"""Running it on one machine: our own Redis-compatible server, and the supervisor of all processes."""
