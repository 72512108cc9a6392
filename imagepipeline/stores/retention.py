"""Retention: what may be forgotten of images that have ended, and which of them Dagster shows.

An image's row, history, results and variants stay for ever. What Dagster has of it is a copy.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from imagepipeline.models import Status, now_utc
from imagepipeline.stores.database import Database
from imagepipeline.stores.tables import images, notifications, provider_calls

# What Dagster has of an image: its runs with all their events, a summary of them, or nothing.
WITH_RUNS, AS_SUMMARY, GONE = "runs", "summary", None
ENDED = (Status.COMPLETED, Status.FAILED)


@dataclass(frozen=True)
class Ended:
    """An image that had ended when it was looked at, and the fence it had."""

    image_id: str
    fence: int


class Retention:
    """What may be pruned of the catalogue's database, and which images are in Dagster.

    Args:
        url: the catalogue's.
        clock: returns the time.
    """

    def __init__(self, url: str, clock: Callable[[], datetime] = now_utc) -> None:
        self._database = Database(url)
        self.clock = clock

    def count_in_dagster(self) -> int:
        """How many images are in Dagster, with their runs or as a summary."""
        with self._database.reading() as connection:
            return int(
                connection.execute(
                    sa.select(sa.func.count()).where(images.c.in_dagster.is_not(None))
                ).scalar_one()
            )

    def list_oldest(
        self,
        limit: int,
        states: Sequence[str] = (WITH_RUNS, AS_SUMMARY),
        before: datetime | None = None,
    ) -> list[Ended]:
        """Up to `limit` ended images that are in Dagster in one of these states, oldest first.

        With `before`, only those that no run has taken since.
        """
        columns = (images.c.id, images.c.fence, images.c.in_dagster_since)
        found: list[sa.Row[tuple[str, int, datetime]]] = []
        with self._database.reading() as connection:
            for state in states:  # one at a time, in the order of the index
                query = (
                    sa.select(*columns)
                    .where(images.c.in_dagster == state, images.c.in_dagster.is_not(None))
                    # As an expression, lest SQLite sort all ended images by the index on status.
                    .where((images.c.status + "").in_(ENDED))
                    .order_by(images.c.in_dagster_since)
                    .limit(limit)
                )
                if before is not None:
                    query = query.where(images.c.in_dagster_since < before)
                found += connection.execute(query).all()
        found.sort(key=lambda row: row.in_dagster_since)
        return [Ended(row.id, row.fence) for row in found[:limit]]

    def count_before(self, before: datetime, states: Sequence[str]) -> int:
        """How many images `list_oldest` lists."""
        query = sa.select(sa.func.count()).where(
            images.c.in_dagster.in_(states),
            images.c.in_dagster.is_not(None),
            images.c.in_dagster_since < before,
            images.c.status.in_(ENDED),
        )
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one())

    @contextmanager
    def holding(self, image: Ended, state: str | None) -> Iterator[bool]:
        """Holds an ended image while Dagster's copy changes, then records its new state.

        Until the end, no push begins a generation of it, and so no run of it is requested. If the
        process is killed, or an error is raised, the old state stays and the next prune repeats.

        Yields:
            False if it was pushed, claimed or erased since it was looked at: leave it alone.
        """
        of_image = sa.and_(
            images.c.id == image.image_id,
            images.c.fence == image.fence,
            images.c.status.in_(ENDED),
        )
        with self._database.transaction() as connection:
            found = connection.execute(sa.select(images.c.id).where(of_image).with_for_update())
            is_held = found.first() is not None
            yield is_held
            if is_held:
                connection.execute(sa.update(images).where(of_image).values(in_dagster=state))

    def note_restored(self, image_id: str) -> None:
        """Records that Dagster has a summary of an image again."""
        gone = sa.and_(images.c.id == image_id, images.c.in_dagster.is_(None))
        with self._database.transaction() as connection:
            connection.execute(
                sa.update(images)
                .where(gone)
                .values(in_dagster=AS_SUMMARY, in_dagster_since=self.clock())
            )

    def count_calls(self, before: datetime) -> int:
        """How many paid calls were made before then."""
        query = sa.select(sa.func.count()).where(provider_calls.c.at < before)
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def prune_calls(self, before: datetime, limit: int) -> int:
        """Deletes up to `limit` older calls, and returns their number.

        Their images keep the sum of what they cost. The sums of each day know it already.
        """
        calls = provider_calls.c
        oldest = (
            sa.select(calls.seq, calls.image_id)
            .where(calls.at < before)
            .order_by(calls.at)
            .limit(limit)
        )
        with self._database.reading() as connection:
            rows = connection.execute(oldest).all()
        of_images = defaultdict(list)
        for row in rows:
            of_images[row.image_id].append(row.seq)
        for image_id, seqs in of_images.items():  # each holds one image for a moment
            with self._database.transaction() as connection:
                # First the image and then its calls, as an erasure does.
                of_image = sa.select(images.c.id).where(images.c.id == image_id)
                connection.execute(of_image.with_for_update())
                deleted = connection.execute(
                    sa.delete(provider_calls)
                    .where(calls.seq.in_(seqs))
                    .returning(calls.image_id, calls.cost_usd)
                ).all()
                # One whose image was erased meanwhile names it no more.
                costs = [
                    row.cost_usd for row in deleted if row.image_id and row.cost_usd is not None
                ]
                if costs:
                    total = sa.func.coalesce(images.c.pruned_cost_usd, 0.0) + sum(costs)
                    connection.execute(
                        sa.update(images)
                        .where(images.c.id == image_id)
                        .values(pruned_cost_usd=total)
                    )
        return len(rows)

    def count_notices(self, before: datetime, channels: Collection[str]) -> int:
        """How many notices of failures before then were sent by all these channels."""
        query = sa.select(sa.func.count()).where(*_were_sent(before, channels))
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def prune_notices(self, before: datetime, channels: Collection[str], limit: int) -> int:
        """Deletes up to `limit` older notices that all these channels have sent; their number."""
        key = (notifications.c.image_id, notifications.c.generation)
        oldest = (
            sa.select(*key)
            .where(*_were_sent(before, channels))
            .order_by(notifications.c.failed_at)
            .limit(limit)
        )
        with self._database.reading() as connection:
            rows = connection.execute(oldest).all()
        if rows:
            with self._database.transaction() as connection:
                connection.execute(
                    sa.delete(notifications).where(sa.tuple_(*key).in_([(*row,) for row in rows]))
                )
        return len(rows)


def note_all_gone(connection: sa.Connection) -> None:
    """Records that Dagster has no image: it is another one, and knows none."""
    in_dagster = images.c.in_dagster.is_not(None)
    connection.execute(sa.update(images).where(in_dagster).values(in_dagster=GONE))


def _were_sent(before: datetime, channels: Collection[str]) -> list[sa.ColumnElement[bool]]:
    sent = (notifications.c[f"{channel}_sent_at"].is_not(None) for channel in channels)
    return [notifications.c.failed_at < before, *sent]
