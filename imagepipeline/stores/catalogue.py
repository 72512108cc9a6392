"""Catalogue: the SQL record of all images, and the only place where an image's status is decided.

Every change is one transaction. Every change by a run names the fence of its claim, so that a run that was
thought dead and was succeeded can change nothing any more.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from imagepipeline.errors import ImageBusyError, PathTakenError, StackError, StaleClaimError
from imagepipeline.models import ASSETS, Claim, ImageMetadata, Recipe, Status, Upload, Variant
from imagepipeline.stores.tables import image_results, image_variants, images

ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class Pending:
    """An image that waits for a run."""

    image_id: str
    generation: int
    priority: int


def now_utc() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


class Catalogue:
    """The images of one database, SQLite or Postgres.

    Args:
        url: a SQLAlchemy URL, `sqlite:///…` or `postgresql://…`.
        clock: gives the time that is written down.
    """

    def __init__(self, url: str, clock: Callable[[], datetime] = now_utc) -> None:
        self._engine = _create_engine(url)
        self._clock = clock
        self._insert: Any = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert

    def migrate(self) -> None:
        """Creates the tables or brings them up to date; safe to call from several processes at once."""
        from alembic import command  # here, because it takes as long to import as all the rest
        from alembic.config import Config

        if self._engine.dialect.name == "sqlite" and self._engine.url.database:
            Path(self._engine.url.database).parent.mkdir(parents=True, exist_ok=True)
        config = Config()
        config.set_main_option("script_location", "imagepipeline.stores:migrations")
        with self._engine.begin() as connection:
            if self._engine.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext("imagepipeline"))))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def check(self) -> None:
        """Returns if the database answers and has our tables.

        Raises:
            StackError: if not. The message leaves out the address, which may hold a password.
        """
        try:
            with self._engine.connect() as connection:
                connection.execute(sa.select(images.c.id).limit(1))
        except sa.exc.DBAPIError as error:
            raise StackError(
                f"the catalogue does not answer ({type(error.orig).__name__}): start the stack with "
                "`imagepipeline up`, or check DATABASE_URL"
            ) from None

    def accept(self, uploads: Iterable[Upload]) -> set[str]:
        """Records uploads as `pending`; gives the IDs for which that began a new generation.

        An image that is pending or processing is left as it is.
        """
        now = self._clock()
        begun = set()
        with self._engine.begin() as connection:
            for upload in uploads:
                insert = self._insert(images).values(
                    id=upload.image_id,
                    status=Status.PENDING,
                    generation=1,
                    fence=0,
                    priority=upload.priority,
                    attempts=0,
                    path=upload.path,
                    accepted_at=now,
                    updated_at=now,
                )
                new_life = _new_generation(now) | {
                    "priority": insert.excluded.priority,
                    "path": sa.func.coalesce(insert.excluded.path, images.c.path),
                }
                statement = insert.on_conflict_do_update(
                    index_elements=[images.c.id],
                    set_=new_life,
                    where=images.c.status.in_([Status.COMPLETED, Status.FAILED]),
                )
                if connection.execute(statement).rowcount:
                    begun.add(upload.image_id)
        return begun

    def list_pending(self, limit: int, except_for: Iterable[tuple[str, int]] = ()) -> list[Pending]:
        """Up to `limit` pending images, highest priority first, then oldest, without the given (ID, generation)s."""
        query = (
            sa.select(images.c.id, images.c.generation, images.c.priority)
            .where(images.c.status == Status.PENDING)
            .order_by(images.c.priority.desc(), images.c.accepted_at, images.c.id)
        )
        known = set(except_for)
        with self._engine.connect() as connection:
            rows = connection.execute(query.limit(limit + len(known)))
            found = [Pending(*row) for row in rows if (row.id, row.generation) not in known]
        return found[:limit]

    def claim(self, image_id: str, generation: int, run_id: str) -> Claim | None:
        """Gives a run the right to an image's generation: the first to ask, and that run whenever it asks again.

        Returns:
            None if the generation is not pending any more, or another run holds it.
        """
        with self._engine.begin() as connection:
            connection.execute(
                sa.update(images)
                .where(images.c.id == image_id, images.c.generation == generation, images.c.status == Status.PENDING)
                .values(self._claimed_by(run_id))
            )
            return self._claim_of(connection, image_id, run_id)

    def claim_anew(self, image_id: str, run_id: str) -> Claim:
        """Gives a run that was started by hand the right to an image, whatever its status.

        An image that had ended begins a new generation; an unknown one is recorded.

        Raises:
            ImageBusyError: another run is working on it.
        """
        now = self._clock()
        with self._engine.begin() as connection:
            known = connection.execute(
                sa.select(images.c.status, images.c.run_id).where(images.c.id == image_id).with_for_update()
            ).first()
            if known is None:
                connection.execute(
                    sa.insert(images).values(
                        id=image_id,
                        status=Status.PENDING,
                        generation=1,
                        fence=0,
                        priority=0,
                        attempts=0,
                        accepted_at=now,
                        updated_at=now,
                    )
                )
            elif Status(known.status).has_ended:
                connection.execute(sa.update(images).where(images.c.id == image_id).values(_new_generation(now)))
            elif known.status == Status.PROCESSING and known.run_id != run_id:
                raise ImageBusyError(f"run {known.run_id} is working on {image_id}: wait until it has ended")
            connection.execute(
                sa.update(images)
                .where(images.c.id == image_id, images.c.status == Status.PENDING)
                .values(self._claimed_by(run_id))
            )
            claim = self._claim_of(connection, image_id, run_id)
        if claim is None:
            raise ImageBusyError(f"{image_id} was claimed by another run at the same moment: try again")
        return claim

    def record_attempt(self, claim: Claim, attempt: int) -> None:
        """Writes down that an asset is being tried for the `attempt`th time (from 1)."""
        most = sa.case((images.c.attempts < attempt, attempt), else_=images.c.attempts)
        with self._engine.begin() as connection:
            self._update(connection, claim, attempts=most)

    def save_metadata(
        self, claim: Claim, metadata: ImageMetadata, path: str, original_bytes: int, original_sha256: str
    ) -> None:
        """Stores what the vision model said, and which original it said it of."""
        with self._engine.begin() as connection:
            self._update(
                connection,
                claim,
                metadata=metadata.model_dump(by_alias=True),
                path=path,
                original_bytes=original_bytes,
                original_sha256=original_sha256,
            )

    def save_variants(self, claim: Claim, variants: Sequence[tuple[str, Variant]]) -> None:
        """Stores the (path, variant) rows in place of the image's older ones; call it before the files are written.

        Raises:
            PathTakenError: a path belongs to another image; nothing was stored.
        """
        rows = [
            {
                "id": f"{claim.image_id}-{variant.spec.suffix}-{variant.spec.format}",
                "image_id": claim.image_id,
                "width": variant.width,
                "height": variant.height,
                "format": variant.spec.format,
                "path": path,
                "size": len(variant.content),
            }
            for path, variant in variants
        ]
        try:
            with self._engine.begin() as connection:
                self._update(connection, claim)
                connection.execute(sa.delete(image_variants).where(image_variants.c.image_id == claim.image_id))
                connection.execute(sa.insert(image_variants), rows)
        except sa.exc.IntegrityError:
            raise PathTakenError(
                f"another image already has a variant at {rows[0]['path']}: originals that differ only in their "
                "extension share their variants' paths, so give one another name"
            ) from None

    def record_result(self, claim: Claim, asset: str, recipe: Recipe, input_sha256: str) -> None:
        """Writes down that an asset's result is in place, and what made it of which input."""
        values = {
            "generation": claim.generation,
            "provider": recipe.provider,
            "model": recipe.model,
            "settings": recipe.settings,
            "input_sha256": input_sha256,
            "made_at": self._clock(),
        }
        insert = self._insert(image_results).values(image_id=claim.image_id, asset=asset, **values)
        with self._engine.begin() as connection:
            self._update(connection, claim)
            connection.execute(insert.on_conflict_do_update(index_elements=["image_id", "asset"], set_=values))

    def finish(self, claim: Claim) -> Status:
        """Ends a claim: `completed` if all results are in place, else back to `pending` for a run that makes them."""
        count = sa.select(sa.func.count()).where(image_results.c.image_id == claim.image_id)
        with self._engine.begin() as connection:
            if connection.execute(count).scalar_one() == len(ASSETS):
                self._update(connection, claim, status=Status.COMPLETED)
                return Status.COMPLETED
            self._hand_back(connection, claim)
            return Status.PENDING

    def fail(self, claim: Claim, reason: str, error: str) -> None:
        """Ends a claim as `failed`, with a word to filter by and a sentence of at most 300 characters."""
        with self._engine.begin() as connection:
            self._update(connection, claim, status=Status.FAILED, reason=reason, error=error[:ERROR_CHARACTERS])

    def hand_back(self, claim: Claim) -> None:
        """Gives the claim up without an end: the image is `pending` again, in a new generation."""
        with self._engine.begin() as connection:
            self._hand_back(connection, claim)

    def get(self, image_id: str) -> dict[str, Any] | None:
        """All that is known of an image: its row, `variants`, and `made_by` per asset; None if it is unknown."""
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(images).where(images.c.id == image_id)).mappings().first()
            if row is None:
                return None
            variants = connection.execute(
                sa.select(image_variants).where(image_variants.c.image_id == image_id).order_by(image_variants.c.id)
            ).mappings()
            results = connection.execute(
                sa.select(image_results).where(image_results.c.image_id == image_id)
            ).mappings()
            made_by = {result["asset"]: _describe_result(result) for result in results}
            return {**row, "variants": [{**variant} for variant in variants], "made_by": made_by}

    def get_states(self, image_ids: Sequence[str]) -> dict[str, tuple[int, Status]]:
        """The generation and status of each known image among the given ones."""
        query = sa.select(images.c.id, images.c.generation, images.c.status).where(images.c.id.in_(image_ids))
        with self._engine.connect() as connection:
            return {row.id: (row.generation, Status(row.status)) for row in connection.execute(query)}

    def count(self) -> dict[str, int]:
        """The number of images in each status."""
        query = sa.select(images.c.status, sa.func.count()).group_by(images.c.status)
        with self._engine.connect() as connection:
            counts = dict(connection.execute(query).tuples().all())
        return {status.value: counts.get(status, 0) for status in Status}

    def _claimed_by(self, run_id: str) -> dict[str, Any]:
        return {
            "status": Status.PROCESSING,
            "run_id": run_id,
            "fence": images.c.fence + 1,
            "updated_at": self._clock(),
        }

    def _claim_of(self, connection: sa.Connection, image_id: str, run_id: str) -> Claim | None:
        row = connection.execute(
            sa.select(images.c.id, images.c.generation, images.c.fence, images.c.path).where(
                images.c.id == image_id, images.c.status == Status.PROCESSING, images.c.run_id == run_id
            )
        ).first()
        return Claim(*row) if row else None

    def _update(self, connection: sa.Connection, claim: Claim, **values: Any) -> None:
        """Changes the claimed row, or raises StaleClaimError if the claim was succeeded."""
        statement = (
            sa.update(images)
            .where(images.c.id == claim.image_id, images.c.fence == claim.fence, images.c.status == Status.PROCESSING)
            .values(updated_at=self._clock(), **values)
        )
        if connection.execute(statement).rowcount == 0:
            raise StaleClaimError(f"the claim on {claim.image_id} (fence {claim.fence}) was taken over")

    def _hand_back(self, connection: sa.Connection, claim: Claim) -> None:
        self._update(
            connection,
            claim,
            status=Status.PENDING,
            generation=images.c.generation + 1,  # a used run key starts no second run
            fence=images.c.fence + 1,
        )


def _new_generation(now: datetime) -> dict[str, Any]:
    """Column values that begin a new life of an image that had ended; its results stay until they are replaced."""
    return {
        "status": Status.PENDING,
        "generation": images.c.generation + 1,
        "fence": images.c.fence + 1,
        "attempts": 0,
        "reason": None,
        "error": None,
        "accepted_at": now,
        "updated_at": now,
    }


def _describe_result(result: sa.RowMapping) -> dict[str, Any]:
    recipe = Recipe(result["provider"], result["model"], result["settings"])
    return {
        "version": recipe.version,
        **{name: result[name] for name in ("provider", "model", "settings", "generation", "input_sha256", "made_at")},
    }


def _create_engine(url: str) -> sa.Engine:
    parsed = sa.make_url(url)
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg2")
    engine = sa.create_engine(parsed, **({} if parsed.drivername.startswith("sqlite") else {"pool_pre_ping": True}))
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_immediate)
    return engine


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN would come too late
    connection.execute("PRAGMA busy_timeout = 30000")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_immediate(connection: sa.Connection) -> None:
    # A transaction that reads before it writes would fail at the write if another one wrote in between.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
