"""History: the log of what happened to each image, written in the transaction that changes it."""

from datetime import datetime

import sqlalchemy as sa

from imagepipeline.stores.tables import UtcDateTime, image_history, images
from imagepipeline.text import make_printable

MAX_CHARACTERS = 300  # of a detail, and of an image's `error`: what their columns hold


def record(
    connection: sa.Connection, image_id: str, event: str, at: datetime, detail: str | None = None
) -> None:
    """Adds an event to an image's history, with the generation, fence and run its row has now."""
    values = sa.select(
        sa.literal(at, UtcDateTime),
        images.c.id,
        images.c.generation,
        images.c.fence,
        images.c.run_id,
        sa.literal(event),
        sa.literal(cut(detail) if detail else None, sa.String),
    ).where(images.c.id == image_id)
    names = ["at", "image_id", "generation", "fence", "run_id", "event", "detail"]
    connection.execute(sa.insert(image_history).from_select(names, values))


def count(
    connection: sa.Connection,
    image_id: str,
    event: str,
    since: datetime | sa.ColumnElement[datetime],
) -> int:
    """How often an event has happened to an image since then."""
    query = sa.select(sa.func.count()).where(
        image_history.c.image_id == image_id,
        image_history.c.event == event,
        image_history.c.at >= since,
    )
    return connection.execute(query).scalar_one()


def cut(text: str) -> str:
    """A text as it is stored: printable, on one line, and no longer than its column."""
    return make_printable(text[:MAX_CHARACTERS])
