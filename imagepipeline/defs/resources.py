"""Resources: how plain objects reach the assets and sensors, and when they are closed.

These are plain functions because `dg.ConfigurableResource` validates and builds each resource three
times in every run. None has Dagster config, so Dagster neither shows nor stores a secret.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from typing import Protocol

import dagster as dg


class Closable(Protocol):
    """An object that can be closed."""

    def close(self) -> None:
        """Releases what it holds."""


def opened(open_it: Callable[[], Closable], description: str) -> dg.ResourceDefinition:
    """An object that is opened when a run or tick starts, and closed when it ends."""
    return entered(lambda: closing(open_it()), description)


def entered(
    enter: Callable[[], AbstractContextManager[object]], description: str
) -> dg.ResourceDefinition:
    """A context manager's object: entered when a run or tick starts, left when it ends."""

    def make(_: dg.InitResourceContext) -> Iterator[object]:
        with enter() as resource:
            yield resource

    return dg.ResourceDefinition(make, description=description)


def made(make_it: Callable[[], object], description: str) -> dg.ResourceDefinition:
    """An object that is made when a run or tick starts, and never closed."""
    return dg.ResourceDefinition(lambda _: make_it(), description=description)
