"""Resources: how the plain objects of `stores` and `services` reach the assets and sensors, and when they are closed.

Plain functions instead of `dg.ConfigurableResource`, which validates and makes each of them three times over, in every
run. None has Dagster config, so no secret is shown in the UI or stored by Dagster.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from typing import Protocol

import dagster as dg


class Closable(Protocol):
    """What can be closed."""

    def close(self) -> None:
        """Gives back what it holds."""


def opened(open_it: Callable[[], Closable], description: str) -> dg.ResourceDefinition:
    """What `open_it` gives, made when a run or tick begins and closed when that ends."""
    return entered(lambda: closing(open_it()), description)


def entered(
    enter: Callable[[], AbstractContextManager[object]], description: str
) -> dg.ResourceDefinition:
    """What a context manager gives, entered when a run or tick begins and left when that ends."""

    def make(_: dg.InitResourceContext) -> Iterator[object]:
        with enter() as resource:
            yield resource

    return dg.ResourceDefinition(make, description=description)


def made(make_it: Callable[[], object], description: str) -> dg.ResourceDefinition:
    """What `make_it` gives, made when a run or tick begins."""
    return dg.ResourceDefinition(lambda _: make_it(), description=description)
