"""Reader: what the catalogue knows of images, in questions that change nothing."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from imagepipeline.errors import PathTakenError, StackError
from imagepipeline.models import (
    BULK_PRIORITY,
    NO_TENANTS,
    Claim,
    ImageMetadata,
    Recipe,
    Status,
    StoredFile,
    TenantSet,
    Upload,
    find_named_image,
    now_utc,
)
from imagepipeline.needs import find_cause
from imagepipeline.stores import history
from imagepipeline.stores.database import Database
from imagepipeline.stores.filters import leave_out
from imagepipeline.stores.tables import (
    INPUT_KEY,
    UNENDED,
    catalogue_owner,
    equals,
    erasures,
    image_history,
    image_results,
    image_variants,
    images,
    provider_calls,
    select_at_paths,
)

K = TypeVar("K")
MAX_COUNTED = 1000
LOOKED_UP_TOGETHER = 500  # rows in one statement
MAX_TWINS = 3  # whose metadata may be of an earlier kind


@dataclass(frozen=True)
class Processing:
    """An image that a run holds; `beat` rises while the run is alive."""

    image_id: str
    generation: int
    fence: int
    run_id: str
    beat: int
    tenant: str

    @property
    def claim(self) -> Claim:
        """The run's claim."""
        return Claim(self.image_id, self.generation, self.fence, None)


@dataclass(frozen=True)
class State:
    """An image's state; `pushes_seen` of its `pushes` were made before its last run started."""

    generation: int
    status: Status
    pushes: int
    pushes_seen: int


@dataclass(frozen=True)
class Pending:
    """An image that waits for a run."""

    image_id: str
    generation: int
    priority: int
    tenant: str = ""


@dataclass(frozen=True)
class Cancelled:
    """An image that was cancelled, the run that held it, if one did, and the sentence."""

    generation: int
    run_id: str | None
    error: str


class Reader:
    """Answers questions about the images of one database, SQLite or Postgres.

    Args:
        url: a SQLAlchemy URL, `sqlite:///…` or `postgresql://…`.
        clock: returns the time.
    """

    def __init__(self, url: str, clock: Callable[[], datetime] = now_utc) -> None:
        self._database = Database(url)
        self._clock = clock

    def close(self) -> None:
        """Closes all connections; a later use opens new ones."""
        self._database.engine.dispose()

    def find_owner(self) -> str | None:
        """The ID of the Dagster instance the catalogue is tied to; it identifies the catalogue."""
        with self._database.reading() as connection:
            owner: str | None = connection.execute(
                sa.select(catalogue_owner.c.dagster_instance_id)
            ).scalar()
        return owner

    def check(self) -> None:
        """Checks that the database answers and has our tables.

        Raises:
            StackError: if not. The message omits the address, which may hold a password.
        """
        url = self._database.engine.url
        if url.drivername == "sqlite" and url.database and not Path(url.database).exists():
            raise StackError(  # the driver would create an empty file
                f"there is no catalogue in {Path(url.database).parent}: start the stack with "
                "`imagepipeline up`, or set IMAGEPIPELINE_HOME (by default .imagepipeline in the "
                "current folder) to where it runs"
            )
        try:
            with self._database.engine.connect() as connection:
                connection.execute(sa.select(image_history.c.seq).limit(1))
        except sa.exc.DBAPIError as error:
            is_bare = type(error.orig).__name__ == "UndefinedTable"  # psycopg2's
            if is_bare or "no such table" in str(error.orig):
                raise StackError(
                    "the database has none of the catalogue's tables: run `imagepipeline migrate` "
                    "or `imagepipeline up`, or check DATABASE_URL"
                ) from None
            raise StackError(
                f"the catalogue does not answer ({type(error.orig).__name__}): start the stack "
                "with `imagepipeline up`, or check DATABASE_URL"
            ) from None

    def find_known(self, image_ids: Sequence[str]) -> dict[str, tuple[str | None, str | None]]:
        """The original's path and SHA-256, as far as they are known, of those images with rows."""
        path = sa.func.coalesce(images.c.path, images.c.requested_path)
        query = sa.select(images.c.id, path, images.c.original_sha256)
        with self._database.reading() as connection:
            rows = connection.execute(query.where(images.c.id.in_(image_ids))).all()
        return {image_id: (path, sha256) for image_id, path, sha256 in rows}

    def find_erased(self, image_ids: Sequence[str]) -> set[str]:
        """Those of the images that were erased, and not pushed since."""
        query = sa.select(erasures.c.image_id).where(
            erasures.c.image_id.in_(image_ids),
            ~sa.exists().where(images.c.id == erasures.c.image_id),
        )
        with self._database.reading() as connection:
            return set(connection.execute(query).scalars())

    def find_owners(self, uploads: Mapping[K, Upload]) -> dict[K, str]:
        """Finds the uploads that name another image's original.

        An original belongs to the image that named it first. A file `original/<image_id>.*` belongs
        to the image of that ID as soon as that is known. Of uploads of one path, the first counts.

        Returns:
            The owner's ID, by the key of the upload.
        """
        named = {key: upload for key, upload in uploads.items() if upload.path is not None}
        if not named:
            return {}
        paths = {str(upload.path) for upload in named.values()}
        names = {name for name in map(find_named_image, paths) if name}
        pushed = {upload.image_id for upload in uploads.values()}
        with self._database.reading() as connection:
            known = (
                set(
                    connection.execute(
                        sa.select(images.c.id).where(images.c.id.in_(names))
                    ).scalars()
                )
                | pushed
            )
            columns = (images.c.id, images.c.requested_path, images.c.path)
            # Two statements, because SQLite reads all rows for an OR of two lists.
            rows = {
                row
                for column in (images.c.requested_path, images.c.path)
                for row in connection.execute(sa.select(*columns).where(column.in_(paths)))
            }
        holders: dict[str, list[str]] = {}
        for row in sorted(rows, key=lambda row: row.id):
            for path in {row.requested_path, row.path} & paths:
                holders.setdefault(path, []).append(row.id)
        owners = {}
        for key, upload in named.items():
            path, name = str(upload.path), find_named_image(str(upload.path))
            held = holders.setdefault(path, [])
            if upload.image_id in (name, *held):
                continue
            if held:
                owners[key] = held[0]
            elif name in known and name != upload.image_id:
                owners[key] = str(name)
            else:
                held.append(upload.image_id)
        return owners

    def check_path(self, claim: Claim, path: str) -> None:
        """Checks that the original at that path belongs to the claimed image, before it is read.

        Raises:
            PathTakenError: it is another image's, by the rules of `find_owners`.
        """
        if path == claim.last_path:
            return
        name = find_named_image(path)
        is_other = sa.and_(
            images.c.id != claim.image_id,
            sa.or_(images.c.path == path, images.c.id == (name or "")),
        )
        with self._database.reading() as connection:
            owner = connection.execute(sa.select(images.c.id).where(is_other).limit(1)).scalar()
        if owner is not None:
            raise PathTakenError(
                f"{path} is the original of {owner}, not of {claim.image_id}: give each image a "
                "file of its own"
            )

    def list_pending(
        self,
        limit: int,
        except_for: Iterable[tuple[str, int]] = (),
        is_rotating: bool = False,
        has_no_variants: bool = False,
        tenant: str | None = None,
    ) -> list[Pending]:
        """Up to `limit` pending uploads that are due: highest priority first, then oldest.

        Images of the bulk lane are not among them.

        Leaves out the (ID, generation) pairs in `except_for`. With `is_rotating`, images that were
        not tried yet come first, then those tried least recently. With `has_no_variants`, only
        images whose variants were not made or confirmed since they were accepted. With a `tenant`,
        only that tenant's.
        """
        by_trial = (images.c.attempts > 0, images.c.updated_at)
        order = by_trial if is_rotating else (images.c.priority.desc(), images.c.accepted_at)
        query = (
            sa.select(images.c.id, images.c.generation, images.c.priority, images.c.tenant)
            .where(self._is_due(), images.c.priority > BULK_PRIORITY)
            .order_by(*order, images.c.id)
        )
        if tenant is not None:
            query = query.where(images.c.tenant == tenant)
        if has_no_variants:
            made = sa.select(image_results.c.image_id).where(
                image_results.c.image_id == images.c.id,
                image_results.c.asset == "variants",
                image_results.c.generation >= images.c.accepted_generation,
                image_results.c.is_stale.is_(False),
                images.c.pushes <= images.c.pushes_seen,
            )
            query = query.where(~made.exists())
        known = set(except_for)
        with self._database.reading() as connection:
            rows = connection.execute(query.limit(limit + len(known)))
            found = [Pending(*row) for row in rows if (row.id, row.generation) not in known]
        return found[:limit]

    def list_waiting_tenants(self, in_bulk_lane: bool | None = None) -> list[str]:
        """The tenants of pending images; the empty one stands for images without a tenant.

        If `in_bulk_lane` is given, only images there, or only uploads, count.
        """
        # One look into the index for each tenant, however many images wait.
        first = sa.select(sa.func.min(images.c.tenant)).where(
            equals(images.c.status, Status.PENDING)
        )
        found = first.scalar_subquery()
        known = sa.select(found.label("tenant")).cte("known", recursive=True)
        following = first.where(images.c.tenant > known.c.tenant).scalar_subquery()
        known = known.union_all(sa.select(following).where(known.c.tenant.is_not(None)))
        query = sa.select(known.c.tenant).where(known.c.tenant.is_not(None))
        if in_bulk_lane is not None:
            is_bulk = images.c.priority == BULK_PRIORITY
            of_lane = sa.select(images.c.id).where(
                equals(images.c.status, Status.PENDING),
                images.c.tenant == known.c.tenant,
                is_bulk if in_bulk_lane else images.c.priority > BULK_PRIORITY,
            )
            query = query.where(of_lane.exists())
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())

    def count_by_tenant(self, status: Status) -> dict[str, int]:
        """The number of images with that status, by tenant."""
        query = (
            sa.select(images.c.tenant, sa.func.count())
            .where(equals(images.c.status, status))
            .group_by(images.c.tenant)
        )
        with self._database.reading() as connection:
            return dict(connection.execute(query).tuples().all())

    def find_causes(self, image_id: str, recipes: Mapping[str, Recipe]) -> dict[str, str | None]:
        """Why each of these assets of an image must be made, or None if its result is current.

        A cause is one of `needs.CAUSES`.
        """
        with self._database.reading() as connection:
            rows = connection.execute(
                sa.select(image_results).where(image_results.c.image_id == image_id)
            ).mappings()
            made = {row["asset"]: {**row} for row in rows}
        return {asset: find_cause(made.get(asset), recipe) for asset, recipe in recipes.items()}

    def count_bulk(
        self, apply_id: int | None = None, except_tenants: TenantSet = NO_TENANTS
    ) -> dict[str, int]:
        """How many images of the bulk lane are pending and due, and processing; 1,000 at most.

        With `apply_id`, only images that this apply has begun.
        """
        of_apply = sa.true() if apply_id is None else images.c.apply_id == apply_id
        counted = leave_out(except_tenants)
        counts = {}
        conditions = {
            "pending": self._is_due(),
            "processing": equals(images.c.status, Status.PROCESSING),
        }
        with self._database.reading() as connection:
            for name, condition in conditions.items():
                lane = sa.select(images.c.id).where(
                    condition, images.c.priority == BULK_PRIORITY, of_apply, counted
                )
                query = sa.select(sa.func.count()).select_from(lane.limit(MAX_COUNTED).subquery())
                counts[name] = int(connection.execute(query).scalar_one())
        return counts

    def count_uploads(self, limit: int) -> int:
        """The number of pending uploads that are due, or the limit if there are more."""
        due = sa.select(images.c.id).where(self._is_due(), images.c.priority > BULK_PRIORITY)
        query = sa.select(sa.func.count()).select_from(due.limit(limit).subquery())
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def has_uploads(self, except_tenants: TenantSet = NO_TENANTS) -> bool:
        """Whether a run works on an upload, or one is due, of other tenants than these."""
        is_upload = images.c.priority > BULK_PRIORITY
        upload = sa.select(images.c.id).where(is_upload, leave_out(except_tenants))
        states = (self._is_due(), equals(images.c.status, Status.PROCESSING))
        with self._database.reading() as connection:
            return any(
                connection.execute(upload.where(state).limit(1)).first() is not None
                for state in states
            )

    def find_twins(self, asset: str, recipe: Recipe, input_sha256: str, limit: int) -> list[str]:
        """Up to `limit` images for which this recipe has made the asset of the same input."""
        query = self._select_twins(asset, recipe, input_sha256)
        with self._database.reading() as connection:
            return list(connection.execute(query.limit(limit)).scalars())

    def find_twin_metadata(self, recipe: Recipe, input_sha256: str) -> ImageMetadata | None:
        """What this recipe has said of another image with the same original, if that is stored."""
        # In one statement: the twin may be given another original at any moment.
        query = self._select_twins("metadata", recipe, input_sha256).join(
            images, images.c.id == image_results.c.image_id
        )
        query = query.with_only_columns(images.c.metadata).limit(MAX_TWINS)
        with self._database.reading() as connection:
            stored = connection.execute(query).scalars().all()
        return next(filter(None, map(ImageMetadata.read, stored)), None)

    def _select_twins(self, asset: str, recipe: Recipe, input_sha256: str) -> sa.Select[tuple[str]]:
        made = image_results.c
        return (
            sa.select(made.image_id)
            .where(sa.text(f"{INPUT_KEY} = substr(:sha256, 1, 16)").bindparams(sha256=input_sha256))
            # As expressions, lest SQLite read all that the recipe has made.
            .where((made.input_sha256 + "") == input_sha256, (made.asset + "") == asset)
            .where(made.provider == recipe.provider, made.model == recipe.model)
            .where(made.settings == recipe.settings)
        )

    def list_processing(self) -> list[Processing]:
        """All images that a run holds."""
        names = ("id", "generation", "fence", "run_id", "beat", "tenant")
        columns = [images.c[name] for name in names]
        with self._database.reading() as connection:
            rows = connection.execute(
                sa.select(*columns).where(equals(images.c.status, Status.PROCESSING))
            )
            return [Processing(*row) for row in rows]

    def list_unended(self, status: Status, limit: int) -> list[dict[str, Any]]:
        """The rows of pending or processing images: highest priority first, then oldest."""
        query = (
            sa.select(images)
            .where(equals(images.c.status, status))
            .order_by(images.c.priority.desc(), images.c.accepted_at, images.c.id)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [{**row} for row in connection.execute(query).mappings()]

    def list_ended(
        self, status: Status, since: datetime | None = None, limit: int = 1000
    ) -> list[dict[str, Any]]:
        """The images that ended with that status, newest first, without discarded failures."""
        query = (
            sa.select(images)
            .where(images.c.status == status, images.c.discarded_at.is_(None))
            .order_by(images.c.updated_at.desc())
            .limit(limit)
        )
        if since is not None:
            query = query.where(images.c.updated_at >= since)
        with self._database.reading() as connection:
            return [{**row} for row in connection.execute(query).mappings()]

    def find_free_paths(self, paths: Collection[str]) -> set[str]:
        """Those of the paths at which no image has a variant."""
        query = select_at_paths(image_variants.c.path, paths)
        with self._database.reading() as connection:
            return set(paths) - set(connection.execute(query).scalars())

    def count_renewals(self, pending: Pending) -> int:
        """How often `renew` began a generation of an image since it was accepted."""
        since = history.accepted_at(pending.image_id)
        with self._database.reading() as connection:
            return history.count(connection, pending.image_id, "renewed", since)

    def find_cancelled(self, image_ids: Sequence[str]) -> dict[str, Cancelled]:
        """Those of the images that ended as `cancelled`, by ID."""
        columns = (images.c.id, images.c.generation, images.c.run_id, images.c.error)
        query = sa.select(*columns).where(
            images.c.id.in_(image_ids),
            images.c.status == Status.FAILED,
            images.c.reason == "cancelled",
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return {row.id: Cancelled(row.generation, row.run_id, row.error) for row in rows}

    def list_events(self, event: str, since: datetime, limit: int) -> list[dict[str, Any]]:
        """Up to `limit` of the COUNTED_EVENTS of that name since then, newest first."""
        query = (
            sa.select(image_history)
            .where(equals(image_history.c.event, event), image_history.c.at >= since)
            .order_by(image_history.c.at.desc(), image_history.c.seq.desc())
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [{**row} for row in connection.execute(query).mappings()]

    def count_events(self, event: str, since: datetime) -> int:
        """How many of the COUNTED_EVENTS of that name there were since then."""
        query = sa.select(sa.func.count()).where(
            equals(image_history.c.event, event), image_history.c.at >= since
        )
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def get(self, image_id: str) -> dict[str, Any] | None:
        """Everything about an image, or None: its row, `variants`, `made_by` and `history`."""
        with self._database.reading() as connection:
            row = (
                connection.execute(sa.select(images).where(images.c.id == image_id))
                .mappings()
                .first()
            )
            if row is None:
                return None
            variants = connection.execute(
                sa.select(image_variants)
                .where(image_variants.c.image_id == image_id)
                .order_by(image_variants.c.id)
            ).mappings()
            results = connection.execute(
                sa.select(image_results).where(image_results.c.image_id == image_id)
            ).mappings()
            made_by = {result["asset"]: _describe_result(result) for result in results}
            story = history.read(connection, image_id)
            return {
                **row,
                "variants": [{**variant} for variant in variants],
                "made_by": made_by,
                "history": story,
            }

    def get_states(self, image_ids: Sequence[str]) -> dict[str, State]:
        """The state of each known image among the given ones."""
        columns = (
            images.c.id,
            images.c.generation,
            images.c.status,
            images.c.pushes,
            images.c.pushes_seen,
        )
        query = sa.select(*columns).where(images.c.id.in_(image_ids))
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return {
            row.id: State(row.generation, Status(row.status), row.pushes, row.pushes_seen)
            for row in rows
        }

    def find_gone(self, image_ids: Collection[str]) -> list[str]:
        """Those of these images that have results and are not in Dagster any more."""
        has_results = sa.select(image_results.c.image_id).where(
            image_results.c.image_id == images.c.id
        )
        query = sa.select(images.c.id).where(
            images.c.id.in_(image_ids), images.c.in_dagster.is_(None), has_results.exists()
        )
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())

    def find_unknown(self, originals: Mapping[str, str]) -> dict[str, str]:
        """Those originals (path by ID) whose ID has no row and whose path no image uses."""
        unknown, all_ids = dict(originals), list(originals)
        with self._database.reading() as connection:
            for start in range(0, len(all_ids), LOOKED_UP_TOGETHER):
                ids = all_ids[start : start + LOOKED_UP_TOGETHER]
                paths = {originals[image_id]: image_id for image_id in ids}
                of_ids = sa.select(images.c.id).where(images.c.id.in_(ids))
                for known in connection.execute(of_ids).scalars():
                    unknown.pop(known, None)
                for column in (images.c.requested_path, images.c.path):
                    of_paths = sa.select(column).where(column.in_(paths))
                    for known in connection.execute(of_paths).scalars():
                        unknown.pop(paths[known], None)
        return unknown

    def find_replaced(self, originals: Mapping[str, StoredFile]) -> list[str]:
        """Those images whose original (by ID) may have been replaced after their last push.

        It was written later or, as a file that was moved keeps its time, has another size. Left
        out are images whose last push named another file.
        """
        replaced, all_ids = [], list(originals)
        columns = (
            *(images.c.id, images.c.status, images.c.accepted_at, images.c.requested_path),
            *(images.c.path, images.c.original_bytes),
        )
        with self._database.reading() as connection:
            for start in range(0, len(all_ids), LOOKED_UP_TOGETHER):
                ids = all_ids[start : start + LOOKED_UP_TOGETHER]
                query = sa.select(*columns).where(images.c.id.in_(ids))
                for row in connection.execute(query):
                    file = originals[row.id]
                    is_later = file.changed_at is not None and file.changed_at > row.accepted_at
                    is_other = row.path == file.path and row.original_bytes != file.size
                    if row.requested_path in (None, file.path) and (
                        is_later or (is_other and row.status == Status.COMPLETED)
                    ):
                        replaced.append(row.id)
        return replaced

    def count(self) -> dict[str, int]:
        """The number of images in each status."""
        query = sa.select(images.c.status, sa.func.count()).group_by(images.c.status)
        with self._database.reading() as connection:
            counts = dict(connection.execute(query).tuples().all())
        return {status.value: counts.get(status, 0) for status in Status}

    def count_failures(self) -> dict[str, int]:
        """The number of failed images by reason, most frequent first, without discarded ones."""
        number = sa.func.count()
        query = (
            sa.select(images.c.reason, number)
            .where(images.c.status == Status.FAILED, images.c.discarded_at.is_(None))
            .group_by(images.c.reason)
            .order_by(number.desc(), images.c.reason)
        )
        with self._database.reading() as connection:
            return dict(connection.execute(query).tuples().all())

    def sum_cost_usd(self, image_id: str) -> float | None:
        """The known cost of all paid calls for an image, in US dollars; None if there is none."""
        of_calls = sa.select(sa.func.sum(provider_calls.c.cost_usd)).where(
            provider_calls.c.image_id == image_id
        )
        of_pruned = sa.select(images.c.pruned_cost_usd).where(images.c.id == image_id)
        with self._database.reading() as connection:
            costs = [connection.execute(query).scalar() for query in (of_calls, of_pruned)]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if known else None

    def find_oldest(self) -> datetime | None:
        """When the oldest upload that has not ended was accepted; planned work does not count."""
        query = sa.select(sa.func.min(images.c.accepted_at)).where(
            sa.text(f"({UNENDED})"),
            images.c.priority > BULK_PRIORITY,
        )
        with self._database.reading() as connection:
            oldest: datetime | None = connection.execute(query).scalar_one()
        return oldest

    def _is_due(self) -> sa.ColumnElement[bool]:
        is_due = sa.or_(images.c.not_before.is_(None), images.c.not_before <= self._clock())
        return sa.and_(equals(images.c.status, Status.PENDING), is_due)


def _describe_result(result: sa.RowMapping) -> dict[str, Any]:
    recipe = Recipe(result["provider"], result["model"], result["settings"])
    return {
        "version": recipe.version,
        **{
            name: result[name]
            for name in (
                *("provider", "model", "settings", "generation", "input_sha256", "made_at"),
                "is_stale",
            )
        },
    }
