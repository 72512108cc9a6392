"""The same operations in children that do not run as root."""

import os

from imagepipeline_tests.imaging.sandbox_operations import CALLS, MAKERS

__all__ = ["CALLS", "MAKERS", "warm_up"]
NOBODY = 65534


def warm_up() -> None:
    """Becomes another user before the first child is forked."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
