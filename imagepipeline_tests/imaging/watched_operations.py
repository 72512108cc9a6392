"""The operations of the sandbox; a child that imports a module after the warm-up ends at once.

In a sandbox, no file can be opened, so an import fails where somebody may catch the error.
"""

import os
import sys
from typing import NoReturn

from imagepipeline.imaging import operations

MAKERS, CALLS = operations.MAKERS, operations.CALLS


class Watch:
    """Finds no module."""

    def find_spec(self, *_: object) -> NoReturn:
        """Ends the process."""
        os._exit(1)


def warm_up() -> None:
    """Does what the operations do, then allows no further import."""
    operations.warm_up()
    sys.meta_path.insert(0, Watch())  # type: ignore[arg-type]
