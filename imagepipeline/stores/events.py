"""Events: the outbox of what apps are told, written in the transaction that changes the image.

So none is lost, none tells of a change that was rolled back, and none comes from a run that was
replaced. A payload is built when it is written and never changes. The stream and the webhook are
marked separately.
"""

import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from imagepipeline.events import Event, EventType, EventVariant, EventWording
from imagepipeline.models import ImageMetadata, Status, now_utc
from imagepipeline.stores.database import Database
from imagepipeline.stores.tables import (
    UtcDateTime,
    event_webhook,
    events,
    image_results,
    image_variants,
    images,
)

KEPT = timedelta(days=3)  # delivered or not; unless the stream has not got it
RETRIED = timedelta(days=1)  # what the webhook has not taken by then is on the dead list
FIRST_WAIT, LONGEST_WAIT = timedelta(seconds=5), timedelta(minutes=5)
LONGEST_POSTPONEMENT = timedelta(hours=1)  # of an event that the webhook refuses
CHANGED_TOGETHER = 1000
MAX_PROBLEM_CHARACTERS = 300
STATUS_OF = {
    EventType.PICTURES_READY: Status.PROCESSING,
    EventType.COMPLETED: Status.COMPLETED,
    EventType.FAILED: Status.FAILED,
}


@dataclass(frozen=True)
class StoredEvent:
    """An event with what became of it; `payload` is its JSON, the same each time it is sent."""

    seq: int
    event_id: str
    image_id: str
    generation: int
    type: str
    at: datetime
    payload: str
    stream_sent_at: datetime | None
    webhook_sent_at: datetime | None


COLUMNS = [events.c[name] for name in (one.name for one in fields(StoredEvent))]


@dataclass(frozen=True)
class WebhookState:
    """How the webhook does; it is not tried before `due_at`.

    `problem` is why the last of `failures` in a row failed.
    """

    failures: int
    due_at: datetime
    problem: str | None
    is_waiting: bool


class EventLog:
    """The events in the catalogue's database, of the last days.

    Args:
        url: the catalogue's.
        clock: returns the time to record.
    """

    def __init__(self, url: str, clock: Callable[[], datetime] = now_utc) -> None:
        self._database = Database(url)
        self._clock = clock

    def list_unsent(self, limit: int) -> list[StoredEvent]:
        """Up to `limit` events that the stream has not got, oldest first."""
        return self._list(events.c.stream_sent_at.is_(None), limit=limit)

    def mark_streamed(self, sent: Sequence[StoredEvent]) -> None:
        """Records that the stream has got these events."""
        self._mark(sent, stream_sent_at=self._clock())

    def list_after(
        self,
        image_id: str | None = None,
        since: int = 0,
        limit: int = 1000,
        except_for: Collection[int] = (),
    ) -> list[StoredEvent]:
        """Up to `limit` events after number `since`, of one image or all, oldest first."""
        conditions = [events.c.seq > since, events.c.seq.not_in(except_for)]
        if image_id is not None:
            conditions.append(events.c.image_id == image_id)
        return self._list(*conditions, limit=limit)

    def list_latest(self, image_id: str | None, limit: int) -> list[StoredEvent]:
        """The latest `limit` events, of one image or all, oldest first."""
        conditions = [] if image_id is None else [events.c.image_id == image_id]
        newest = sa.select(*COLUMNS).where(*conditions).order_by(events.c.seq.desc()).limit(limit)
        with self._database.reading() as connection:
            return [StoredEvent(*row) for row in connection.execute(newest)][::-1]

    def prune(self) -> int:
        """Deletes some of the events that are too old; returns their number."""
        old = (
            sa.select(events.c.seq)
            .where(events.c.at < self._clock() - KEPT, events.c.stream_sent_at.is_not(None))
            .limit(CHANGED_TOGETHER)
        )
        with self._database.reading() as connection:
            numbers = connection.execute(old).scalars().all()
        if numbers:
            with self._database.transaction() as connection:
                connection.execute(sa.delete(events).where(events.c.seq.in_(numbers)))
        return len(numbers)

    def open_webhook(self) -> WebhookState:
        """The webhook's state; the first time, it is set up to be owed what happens from now on."""
        known = self.find_webhook()
        if known is None:
            known = WebhookState(0, self._clock(), None, False)
            insert = self._database.insert(event_webhook).values(
                id=1, failures=known.failures, due_at=known.due_at
            )
            with self._database.transaction() as connection:
                connection.execute(insert.on_conflict_do_nothing())
        return known

    def find_webhook(self) -> WebhookState | None:
        """The webhook's state; None if none is set."""
        with self._database.reading() as connection:
            row = connection.execute(sa.select(event_webhook)).first()
        if row is None:
            return None
        return WebhookState(row.failures, row.due_at, row.problem, row.due_at > self._clock())

    def close_webhook(self) -> None:
        """Records that no webhook is set, so that one set later is not owed older events."""
        if self.find_webhook():
            with self._database.transaction() as connection:
                connection.execute(sa.delete(event_webhook))

    def list_owed(self, limit: int) -> list[StoredEvent]:
        """Up to `limit` events that the webhook is owed now, oldest first.

        While an event is postponed, later ones of its image wait. Some of those that were owed for
        more than a day go to the dead list first.
        """
        now = self._clock()
        self._bury(now)
        earlier = events.alias()
        is_held_up = (
            sa.select(earlier.c.seq)
            .where(
                earlier.c.image_id == events.c.image_id,
                earlier.c.seq < events.c.seq,
                earlier.c.webhook_since.is_not(None),
                earlier.c.webhook_due_at > now,
            )
            .exists()
        )
        return self._list(
            events.c.webhook_since.is_not(None),
            sa.or_(events.c.webhook_due_at.is_(None), events.c.webhook_due_at <= now),
            ~is_held_up,
            limit=limit,
        )

    def list_dead(self, limit: int) -> list[StoredEvent]:
        """Up to `limit` events that the webhook has not taken within a day, oldest first."""
        return self._list(events.c.webhook_died_at.is_not(None), limit=limit)

    def mark_posted(self, sent: Sequence[StoredEvent]) -> None:
        """Records that the webhook has taken these events, and so works."""
        now = self._clock()
        self._mark(sent, webhook_sent_at=now, webhook_since=None)
        self._update_webhook(failures=0, due_at=now, problem=None)

    def note_webhook_failure(self, problem: str) -> None:
        """Records that the webhook failed: it is tried again after 5 s, 10 s, … 5 minutes."""
        state = self.open_webhook()
        wait = min(FIRST_WAIT * 2 ** min(state.failures, 20), LONGEST_WAIT)
        self._update_webhook(
            failures=state.failures + 1,
            due_at=self._clock() + wait,
            problem=problem[:MAX_PROBLEM_CHARACTERS],
        )

    def postpone(self, refused: StoredEvent) -> None:
        """Has an event that the webhook refuses wait as long again as it has waited already."""
        now = self._clock()
        wait = min(max(FIRST_WAIT, now - refused.at), LONGEST_POSTPONEMENT)
        self._mark([refused], webhook_due_at=now + wait)

    def resend(self, chosen: Sequence[StoredEvent]) -> None:
        """Has the webhook get these events, though it has got them or they are dead."""
        self._mark(chosen, webhook_since=self._clock(), webhook_due_at=None, webhook_died_at=None)

    def _bury(self, now: datetime) -> None:
        oldest = (
            sa.select(events.c.seq, events.c.webhook_since)
            .where(events.c.webhook_since.is_not(None))
            .order_by(events.c.seq)
            .limit(CHANGED_TOGETHER)
        )
        with self._database.reading() as connection:
            owed = connection.execute(oldest).all()
        if dead := [row.seq for row in owed if row.webhook_since <= now - RETRIED]:
            self._change(dead, webhook_died_at=now, webhook_since=None)

    def _list(self, *conditions: sa.ColumnElement[bool], limit: int) -> list[StoredEvent]:
        query = sa.select(*COLUMNS).where(*conditions).order_by(events.c.seq).limit(limit)
        with self._database.reading() as connection:
            return [StoredEvent(*row) for row in connection.execute(query)]

    def _mark(self, chosen: Sequence[StoredEvent], **values: Any) -> None:
        self._change([event.seq for event in chosen], **values)

    def _change(self, numbers: Sequence[int], **values: Any) -> None:
        with self._database.transaction() as connection:
            connection.execute(sa.update(events).where(events.c.seq.in_(numbers)).values(values))

    def _update_webhook(self, **values: Any) -> None:
        with self._database.transaction() as connection:
            connection.execute(sa.update(event_webhook).values(values))


def add(connection: sa.Connection, image_id: str, kind: EventType, at: datetime) -> None:
    """Adds an event about an image, from its rows as they are now."""
    row = connection.execute(sa.select(images).where(images.c.id == image_id)).mappings().one()
    results = connection.execute(
        sa.select(image_results).where(image_results.c.image_id == image_id)
    )
    # A failed image may still have the results of an earlier original.
    since = row["accepted_generation"] if kind is EventType.FAILED else 0
    current = {
        result.asset for result in results if not result.is_stale and result.generation >= since
    }
    facts = ("flaw", "width", "height", "placeholder", "dominant_color")
    _insert(
        connection,
        Event(
            event_id=str(uuid.uuid4()),
            type=kind,
            at=at,
            image_id=image_id,
            generation=row["generation"],
            status=STATUS_OF[kind].value,
            reason=row["reason"] if kind is EventType.FAILED else None,
            error=row["error"] if kind is EventType.FAILED else None,
            **({name: row[name] for name in facts} if current & {"metadata", "variants"} else {}),
            **(_describe(row["metadata"]) if "metadata" in current else {}),
            variants=_list_variants(connection, image_id) if "variants" in current else (),
        ),
    )


def replace_by_erased(
    connection: sa.Connection, image_id: str, generation: int, at: datetime
) -> int:
    """Deletes an image's events, which quote its description, and adds that it was erased.

    Returns the number of deleted ones. The relay deletes those on the stream.
    """
    deleted = connection.execute(sa.delete(events).where(events.c.image_id == image_id)).rowcount
    erased = Event(
        event_id=str(uuid.uuid4()),
        type=EventType.ERASED,
        at=at,
        image_id=image_id,
        generation=generation,
        status="erased",
    )
    _insert(connection, erased)
    return deleted


def lacks_description(connection: sa.Connection, image_id: str) -> bool:
    """Whether an image has no description of its present original."""
    query = sa.select(image_results.c.is_stale).where(
        image_results.c.image_id == image_id, image_results.c.asset == "metadata"
    )
    is_stale = connection.execute(query).scalar()
    return is_stale is None or bool(is_stale)


def _insert(connection: sa.Connection, event: Event) -> None:
    connection.execute(
        sa.insert(events).values(
            event_id=event.event_id,
            image_id=event.image_id,
            generation=event.generation,
            type=event.type.value,
            at=event.at,
            payload=event.model_dump_json(by_alias=True),
            webhook_since=sa.select(sa.literal(event.at, UtcDateTime))
            .select_from(event_webhook)
            .scalar_subquery(),  # empty without a webhook
        )
    )


def _describe(stored: Any) -> dict[str, Any]:
    """The fields of a stored description; none if it is of an earlier kind."""
    metadata = ImageMetadata.read(stored)
    if metadata is None:
        return {}
    return {
        "description": metadata.description,
        "tags": tuple(metadata.tags),
        "category": metadata.category,
        "mood": metadata.mood,
        "languages": {
            tag: EventWording(**wording.model_dump()) for tag, wording in metadata.languages.items()
        },
    }


def _list_variants(connection: sa.Connection, image_id: str) -> tuple[EventVariant, ...]:
    query = (
        sa.select(image_variants)
        .where(
            image_variants.c.image_id == image_id,
            image_variants.c.is_published,
            ~image_variants.c.is_alias,
        )
        .order_by(image_variants.c.format, image_variants.c.width, image_variants.c.path)
    )
    return tuple(
        EventVariant(
            name=row.id.removeprefix(f"{image_id}-").removesuffix(f"-{row.format}"),
            path=row.path,
            format=row.format,
            width=row.width,
            height=row.height,
            bytes=row.size,
        )
        for row in connection.execute(query)
    )
