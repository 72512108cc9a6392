"""Erasures: removes every row of an image, and remembers that it was erased."""

from collections.abc import Callable, Collection
from datetime import datetime

import sqlalchemy as sa

from imagepipeline.models import Status, now_utc
from imagepipeline.stores import events
from imagepipeline.stores.database import Database
from imagepipeline.stores.tables import (
    answers,
    batch_requests,
    erasures,
    image_variants,
    images,
    provider_calls,
    schema,
    select_at_paths,
)
from imagepipeline.stores.tables import events as events_table

# All others with the column `image_id` lose the image's rows.
KEPT = (provider_calls, batch_requests, erasures, events_table)


class Erasures:
    """The erased images in the catalogue's database, and how an image becomes one."""

    def __init__(self, url: str, clock: Callable[[], datetime] = now_utc) -> None:
        self._database = Database(url)
        self._clock = clock

    def find_foreign(self, image_id: str, paths: Collection[str]) -> set[str]:
        """Those of the paths at which other images have their original or a variant."""
        variants = select_at_paths(
            image_variants.c.path, paths, image_variants.c.image_id != image_id
        )
        with self._database.reading() as connection:
            found = set(connection.execute(variants).scalars())
            for column in (images.c.path, images.c.requested_path):
                originals = sa.select(column).where(column.in_(paths), images.c.id != image_id)
                found.update(connection.execute(originals).scalars())
        return found

    def count(self, image_id: str) -> dict[str, int]:
        """The number of rows about an image, by table, without those that are kept."""
        with self._database.reading() as connection:
            counts = {
                table.name: connection.execute(
                    sa.select(sa.func.count()).where(column == image_id)
                ).scalar_one()
                for table, column in _list_columns()
            }
        return {name: count for name, count in counts.items() if count}

    def remove(
        self, image_id: str, fence: int | None, answer_keys: Collection[str]
    ) -> dict[str, int] | None:
        """Removes all rows about an ended image, and the answers kept under these keys.

        What its paid calls cost is kept without the ID. A later push goes on from its generation
        and fence, so that a run of today can never write to the image of tomorrow.

        Args:
            image_id: the image.
            fence: that of its row when the caller looked; None if there was no row.
            answer_keys: see `Ledger.record`.

        Returns:
            The number of removed rows by table; None if the image has changed since the caller
            looked: it was pushed, or a run holds it. Then nothing is removed.
        """
        now = self._clock()
        of_image = images.c.id == image_id
        query = sa.select(images.c.generation, images.c.fence, images.c.status).where(of_image)
        with self._database.transaction() as connection:
            row = connection.execute(query.with_for_update()).first()
            if (row and row.fence) != fence:
                return None
            if row and not Status(row.status).has_ended:
                return None
            if row:
                values = {"generation": row.generation, "fence": row.fence, "erased_at": now}
                insert = self._database.insert(erasures).values(image_id=image_id, **values)
                connection.execute(
                    insert.on_conflict_do_update(index_elements=["image_id"], set_=values)
                )
            removed = {
                table.name: connection.execute(sa.delete(table).where(column == image_id)).rowcount
                for table, column in _list_columns()
            }
            # Its answer will come, and what it costs counts. If the answer is just being stored,
            # this waits for it, so the calls come next.
            connection.execute(
                sa.update(batch_requests)
                .where(batch_requests.c.image_id == image_id)
                .values(image_id="")
            )
            connection.execute(
                sa.update(provider_calls)
                .where(provider_calls.c.image_id == image_id)
                .values(image_id=None, generation=None)
            )
            connection.execute(sa.delete(answers).where(answers.c.key.in_(answer_keys)))
            if row:
                told = events.replace_by_erased(connection, image_id, row.generation, now)
                removed[events_table.name] = told
        return {name: count for name, count in removed.items() if count}

    def forget_traces(self) -> bool:
        """On SQLite, empties the write-ahead log; False if a reader prevents it."""
        return self._database.truncate_log()


def _list_columns() -> list[tuple[sa.Table, sa.ColumnElement[str]]]:
    """The tables with rows about images, those first that refer to others, and their ID columns."""
    tables = [table for table in reversed(schema.sorted_tables) if table not in KEPT]
    return [(table, table.c.image_id) for table in tables if "image_id" in table.c] + [
        (images, images.c.id)
    ]
