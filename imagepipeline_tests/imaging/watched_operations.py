"""The operations of the sandbox; a child ends at once if it imports a module or is refused a call.

In a sandbox, no file can be opened, so these fail where somebody may catch the error.
"""

import os
import sys
from typing import NoReturn

from imagepipeline.imaging import confinement, operations

MAKERS, CALLS = operations.MAKERS, operations.CALLS


class Watch:
    """Finds no module."""

    def find_spec(self, *_: object) -> NoReturn:
        """Ends the process."""
        os._exit(1)


def warm_up() -> None:
    """Does what the operations do, then allows no further import and no refused system call."""
    operations.warm_up()
    confinement.FORBID = confinement.KILL_PROCESS
    sys.meta_path.insert(0, Watch())  # type: ignore[arg-type]
