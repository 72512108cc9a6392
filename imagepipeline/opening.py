"""Opens the stores the settings name, for commands.

Each is imported when it is asked for, so that `push` need not wait for SQLAlchemy.
"""

from typing import TYPE_CHECKING

from imagepipeline.settings import Settings

if TYPE_CHECKING:
    from imagepipeline.stores.catalogue import Catalogue
    from imagepipeline.stores.events import EventLog
    from imagepipeline.stores.uploads import UploadQueue


def open_queue(settings: Settings) -> "UploadQueue":
    """The Redis lists; they connect when first used."""
    from imagepipeline.stores.uploads import UploadQueue

    return UploadQueue(settings.redis_url, settings.queue_prefix)


def open_catalogue(settings: Settings) -> "Catalogue":
    """The catalogue, which answers and has its tables.

    Raises:
        StackError: if not.
    """
    from imagepipeline.stores.catalogue import Catalogue

    catalogue = Catalogue(settings.database_url)
    catalogue.check()
    return catalogue


def open_events(settings: Settings) -> "EventLog":
    """The events in the catalogue, which answers and has its tables; raises as `open_catalogue`."""
    from imagepipeline.stores.events import EventLog

    open_catalogue(settings)
    return EventLog(settings.database_url)
