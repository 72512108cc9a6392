"""History: the log of what happened to each image, written in the transaction that changes it."""

from collections.abc import Collection
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from imagepipeline.stores.tables import UtcDateTime, image_history, images
from imagepipeline.text import make_printable

FIELDS = ("at", "event", "generation", "fence", "run_id", "detail")
MAX_READ = 1000  # lines of an image
MAX_CHARACTERS = 300  # of a detail, and of an image's `error`: what their columns hold


def record(
    connection: sa.Connection, image_id: str, event: str, at: datetime, detail: str | None = None
) -> None:
    """Adds an event to an image's history, with the generation, fence and run its row has now."""
    _insert(connection, images.c.id == image_id, event, at, detail)


def record_all(
    connection: sa.Connection,
    image_ids: Collection[str],
    event: str,
    at: datetime,
    which: sa.ColumnElement[bool] | None = None,
) -> None:
    """Adds an event to the history of each of these images, or of those for which `which` holds."""
    if not image_ids:
        return
    condition = images.c.id.in_(image_ids)
    _insert(connection, condition if which is None else sa.and_(condition, which), event, at, None)


def _insert(
    connection: sa.Connection,
    condition: sa.ColumnElement[bool],
    event: str,
    at: datetime,
    detail: str | None,
) -> None:
    values = sa.select(
        sa.literal(at, UtcDateTime),
        images.c.id,
        images.c.generation,
        images.c.fence,
        # It changes with no other event: `read` gives it to those that follow.
        images.c.run_id if event == "claimed" else sa.null(),
        sa.literal(event),
        sa.literal(cut(detail) if detail else None, sa.String),
    ).where(condition)
    names = ["at", "image_id", "generation", "fence", "run_id", "event", "detail"]
    connection.execute(sa.insert(image_history).from_select(names, values))


def read(connection: sa.Connection, image_id: str) -> list[dict[str, Any]]:
    """The latest events of an image, oldest first, each with the run that had the last claim then.

    An image that is pushed every minute has a million lines in a few months.
    """
    query = (
        sa.select(*(image_history.c[name] for name in FIELDS))
        .where(image_history.c.image_id == image_id)
        .order_by(image_history.c.seq.desc())
        .limit(MAX_READ)
    )
    story, run_id = [], None
    for event in connection.execute(query).mappings().all()[::-1]:
        run_id = event["run_id"] or run_id
        story.append({**event, "run_id": run_id})
    return story


def accepted_at(image_id: str) -> sa.ScalarSelect[Any]:
    """When an image was accepted last, as a part of a statement."""
    return sa.select(images.c.accepted_at).where(images.c.id == image_id).scalar_subquery()


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
