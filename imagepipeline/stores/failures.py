"""FailedImages: the images that have failed, as an administrator lists and dismisses them."""

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from imagepipeline.models import Status, now_utc
from imagepipeline.stores import history
from imagepipeline.stores.database import Database
from imagepipeline.stores.tables import images


class FailedImages:
    """The failed images in the catalogue's database, without those that were discarded."""

    def __init__(self, url: str, clock: Callable[[], datetime] = now_utc) -> None:
        self._database = Database(url)
        self._clock = clock

    def iterate(self, reason: str | None = None, page_rows: int = 500) -> Iterator[dict[str, Any]]:
        """Their rows, newest first, of one reason or of all; one page at a time is in memory.

        Rows may change between pages: each page starts after the last row of the one before.
        """
        query = (
            sa.select(images)
            .where(images.c.status == Status.FAILED, images.c.discarded_at.is_(None))
            .order_by(images.c.updated_at.desc(), images.c.id.desc())
            .limit(page_rows)
        )
        if reason is not None:
            query = query.where(images.c.reason == reason)
        page = query
        while True:
            with self._database.reading() as connection:
                rows = [{**row} for row in connection.execute(page).mappings()]
            yield from rows
            if len(rows) < page_rows:
                return
            last = rows[-1]
            is_older = (images.c.updated_at < last["updated_at"]) | (images.c.id < last["id"])
            # The first condition for the index: it would not see the bound in the second.
            page = query.where(images.c.updated_at <= last["updated_at"], is_older)

    def count_retries(self, image_id: str, since: datetime) -> int:
        """How often an administrator has retried an image since then."""
        with self._database.reading() as connection:
            return history.count(connection, image_id, "retried", since)

    def discard(self, image_id: str) -> bool:
        """Takes a failed image off the list; False if it has not failed."""
        now = self._clock()
        statement = (
            sa.update(images)
            .where(images.c.id == image_id, images.c.status == Status.FAILED)
            .values(discarded_at=now)
        )
        with self._database.transaction() as connection:
            if not connection.execute(statement).rowcount:
                return False
            history.record(connection, image_id, "discarded", now)
            return True
