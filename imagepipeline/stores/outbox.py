"""Outbox: notices of final failures for the administrators.

A notice is written in the transaction that fails the image, so that none is lost and none is sent
for a failure that was rolled back. Each channel (`webhook`, `mail`) is marked separately.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from imagepipeline.models import now_utc
from imagepipeline.stores.database import Database
from imagepipeline.stores.tables import UtcDateTime, images, notifications

WINDOW = timedelta(days=7)


class Outbox:
    """The unsent notices in the catalogue's database."""

    def __init__(self, url: str, clock: Callable[[], datetime] = now_utc) -> None:
        self._database = Database(url)
        self._clock = clock

    def list_unsent(self, channel: str, limit: int = 100) -> list[dict[str, Any]]:
        """Failures of the last week of which `webhook` or `mail` was not notified, oldest first."""
        sent_at = notifications.c[f"{channel}_sent_at"]
        query = (
            sa.select(notifications)
            .where(sent_at.is_(None), notifications.c.failed_at >= self._clock() - WINDOW)
            .order_by(notifications.c.failed_at)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [{**row} for row in connection.execute(query).mappings()]

    def mark_sent(self, channel: str, sent: Iterable[Mapping[str, Any]]) -> None:
        """Records that a channel was notified of these failures."""
        with self._database.transaction() as connection:
            for row in sent:
                connection.execute(
                    sa.update(notifications)
                    .where(
                        notifications.c.image_id == row["image_id"],
                        notifications.c.generation == row["generation"],
                    )
                    .values({f"{channel}_sent_at": self._clock()})
                )


def add(connection: sa.Connection, image_id: str, at: datetime) -> None:
    """Adds a notice of an image that has just failed, from its row."""
    row = sa.select(
        images.c.id,
        images.c.generation,
        images.c.reason,
        images.c.error,
        images.c.attempts,
        sa.literal(at, UtcDateTime),
    ).where(images.c.id == image_id)
    names = ["image_id", "generation", "reason", "error", "attempts", "failed_at"]
    connection.execute(sa.insert(notifications).from_select(names, row))


def withdraw_unsent(connection: sa.Connection, image_id: str) -> None:
    """Deletes the notice of an image's current generation, if no channel was notified yet."""
    generation = sa.select(images.c.generation).where(images.c.id == image_id).scalar_subquery()
    unsent = sa.and_(
        notifications.c.image_id == image_id,
        notifications.c.generation == generation,
        notifications.c.webhook_sent_at.is_(None),
        notifications.c.mail_sent_at.is_(None),
    )
    connection.execute(sa.delete(notifications).where(unsent))
