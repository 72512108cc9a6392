"""Applies: what people have asked to be made of a plan, how far it is, and what it has cost."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timedelta

import sqlalchemy as sa

from imagepipeline.errors import ApplyBusyError
from imagepipeline.filters import ALL, Filter
from imagepipeline.models import Recipe, Status, now_utc
from imagepipeline.stores.database import Database
from imagepipeline.stores.tables import applies, images


@dataclass(frozen=True)
class Apply:
    """One apply.

    Attributes:
        id: its number.
        began_at: when it was asked for.
        expires_at: when its lease ends, which the command that follows it renews; None if Dagster's
            job `apply_plan` started it, which nobody follows.
        end_reason: why it begins no more images; None while it does.
        max_images: how many images it may begin; None for all.
        budget_usd: US dollars after which it begins no more; None for no limit.
        recipes: the versions of the recipes that were planned, by asset.
        conditions: which images it may begin: JSON of `Filter.to_list`.
        begun_count: the images begun so far.
        last_id: the last of them, or one up to which no other is left; images begin in the order
            of their IDs.
        spent_usd: what paid calls for its images have cost so far, in batches before, too.
    """

    id: int
    began_at: datetime
    expires_at: datetime | None
    end_reason: str | None
    max_images: int | None
    budget_usd: float | None
    recipes: Mapping[str, str]
    conditions: str
    begun_count: int
    last_id: str
    spent_usd: float

    @property
    def where(self) -> Filter:
        """Which images it may begin."""
        return Filter.parse(json.loads(self.conditions))

    def describe(self) -> str:
        """Who holds it, since when, and how far it is, as a part of a sentence."""
        holder = "an `apply` of another command" if self.expires_at else "an apply of Dagster's UI"
        return (
            f"{holder} is under way since {self.began_at:%F %R} UTC, with {self.begun_count:,} "
            "images begun"
        )

    def explain_busy(self) -> str:
        """Why no other one may start, and what to do, as a sentence."""
        return (
            f"{self.describe()}: wait until it has ended, or end it with "
            "`imagepipeline apply --stop`"
        )


@dataclass(frozen=True)
class ApplyProgress:
    """How many images of an apply have begun, completed and failed, and US dollars spent."""

    begun: int
    completed: int
    failed: int
    spent_usd: float

    @property
    def unfinished(self) -> int:
        """How many images wait or run."""
        return self.begun - self.completed - self.failed


class Applies:
    """The applies in the catalogue's database. At most one is open: it still begins images.

    Args:
        url: a SQLAlchemy URL.
        clock: returns the time.
    """

    def __init__(self, url: str, clock: Callable[[], datetime] = now_utc) -> None:
        self._database = Database(url)
        self._clock = clock

    def start(
        self,
        recipes: Mapping[str, Recipe],
        max_images: int | None = None,
        budget_usd: float | None = None,
        where: Filter = ALL,
        lease_seconds: float | None = None,
        spent_usd: float = 0,
    ) -> Apply:
        """Opens an apply of images that need one of these recipes.

        Args:
            recipes: by asset.
            max_images: how many images it may begin; None for all.
            budget_usd: US dollars after which it begins no more; None for no limit.
            where: which images it may begin.
            lease_seconds: it ends unless `renew` is called as often; None if it need not be.
            spent_usd: what its batches have cost.

        Raises:
            ApplyBusyError: another one is open.
        """
        now = self._clock()
        with self._database.transaction() as connection:
            open_one = connection.execute(self._select_open().with_for_update()).first()
            if open_one is not None:
                raise ApplyBusyError(Apply(*open_one).explain_busy())
            apply_id = connection.execute(
                sa.insert(applies)
                .values(
                    began_at=now,
                    expires_at=_expire(now, lease_seconds),
                    max_images=max_images,
                    budget_usd=budget_usd,
                    conditions=json.dumps(where.to_list()),
                    recipes={asset: recipe.version for asset, recipe in recipes.items()},
                    begun_count=0,
                    last_id="",
                    spent_usd=spent_usd,
                )
                .returning(applies.c.id)
            ).scalar_one()
        return self.get(apply_id)

    def get(self, apply_id: int) -> Apply:
        """The apply of that number, which must exist."""
        query = sa.select(*_COLUMNS).where(applies.c.id == apply_id)
        with self._database.reading() as connection:
            return Apply(*connection.execute(query).one())

    def find_open(self) -> Apply | None:
        """The apply that still begins images, if there is one."""
        with self._database.reading() as connection:
            row = connection.execute(self._select_open()).first()
        return Apply(*row) if row else None

    def renew(self, apply_id: int, lease_seconds: float) -> None:
        """Extends an apply's lease, unless it begins no more images.

        Raises:
            ApplyBusyError: its lease had expired, and another apply is open since.
        """
        expires_at = _expire(self._clock(), lease_seconds)
        still_begins = (applies.c.id == apply_id, applies.c.ended_at.is_(None))
        with self._database.transaction() as connection:
            other = connection.execute(self._select_open().where(applies.c.id != apply_id)).first()
            renewed = connection.execute(
                sa.update(applies).where(*still_begins).values(expires_at=expires_at)
            )
            if other is not None and renewed.rowcount:  # the exception undoes it
                raise ApplyBusyError(
                    "this apply stood still for so long that another one began: "
                    + Apply(*other).explain_busy()
                )

    def end(self, apply_id: int, reason: str) -> None:
        """Lets an apply begin no more images; those that have begun end by themselves."""
        with self._database.transaction() as connection:
            connection.execute(
                sa.update(applies)
                .where(applies.c.id == apply_id, applies.c.ended_at.is_(None))
                .values(ended_at=self._clock(), end_reason=reason)
            )

    def pass_over(self, apply_id: int, last_id: str) -> None:
        """Records that no image up to this ID need be begun."""
        with self._database.transaction() as connection:
            connection.execute(
                sa.update(applies).where(applies.c.id == apply_id).values(last_id=last_id)
            )

    def measure(self, apply_id: int) -> ApplyProgress:
        """How far an apply is."""
        # By status, so that the index finds the few that are not completed.
        statuses = [status for status in Status if status != Status.COMPLETED]
        count = (
            sa.select(images.c.status, sa.func.count())
            .where(images.c.apply_id == apply_id, images.c.status.in_(statuses))
            .group_by(images.c.status)
        )
        with self._database.reading() as connection:
            counts = dict(connection.execute(count).tuples().all())
            begun, spent_usd = connection.execute(
                sa.select(applies.c.begun_count, applies.c.spent_usd).where(
                    applies.c.id == apply_id
                )
            ).one()
        completed = begun - sum(counts.values())
        return ApplyProgress(begun, completed, counts.get(Status.FAILED, 0), round(spent_usd, 6))

    def _select_open(self) -> sa.Select[tuple[object, ...]]:
        """The open apply; one whose lease has expired is not open."""
        return sa.select(*_COLUMNS).where(
            applies.c.ended_at.is_(None),
            sa.or_(applies.c.expires_at.is_(None), applies.c.expires_at > self._clock()),
        )


_COLUMNS = [applies.c[one.name] for one in fields(Apply)]


def _expire(now: datetime, lease_seconds: float | None) -> datetime | None:
    return None if lease_seconds is None else now + timedelta(seconds=lease_seconds)
