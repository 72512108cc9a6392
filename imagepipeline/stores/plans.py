"""Plans: which results are not what today's settings would make, counted and listed in SQL."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from imagepipeline.filters import ALL, Condition, Filter
from imagepipeline.models import NO_TENANTS, Recipe, Status, TenantSet
from imagepipeline.needs import MISSING, find_cause
from imagepipeline.stores.database import Database
from imagepipeline.stores.filters import build_conditions, leave_out
from imagepipeline.stores.tables import image_results, images

MADE = image_results.c
READ_TOGETHER = 500  # IDs
LOOKED_THROUGH = 50_000  # images, by one statement of a tick: about 0.2 s


@dataclass(frozen=True)
class Outdated:
    """How many images need an asset for the same cause, one of `needs.CAUSES`."""

    asset: str
    cause: str
    images: int


class Plans:
    """Reads what the images in the catalogue's database need."""

    def __init__(self, url: str, is_patient: bool = True) -> None:
        self._database = Database(url)
        self._is_patient = is_patient  # not in a tick, which Dagster gives up after a minute

    def count_outdated(self, recipes: Mapping[str, Recipe], where: Filter = ALL) -> list[Outdated]:
        """Counts results by asset and cause; all images count, whatever their status."""
        query = _count_results()
        count = sa.select(sa.func.count()).select_from(images)
        if conditions := self._build(where):
            query = query.join(images, images.c.id == MADE.image_id).where(*conditions)
            count = count.where(*conditions)
        with self._database.reading(self._is_patient) as connection:
            groups = connection.execute(query).mappings().all()
            total = connection.execute(count).scalar_one()
        found = []
        for asset, recipe in recipes.items():
            made = [group for group in groups if group["asset"] == asset]
            if missing := total - sum(group["count"] for group in made):
                found.append(Outdated(asset, MISSING, missing))
            found += _sum_by_cause(asset, recipe, made)
        return found

    def leave_out_failed(
        self, counted: list[Outdated], recipes: Mapping[str, Recipe], where: Filter = ALL
    ) -> list[Outdated]:
        """What `count_outdated` counted without failed images, unless `where` names a status.

        Only `failed retry` or another push makes these.
        """
        if any(condition.field == "status" for condition in where.conditions):
            return counted
        have_failed = Filter((*where.conditions, Condition("status", Status.FAILED)))
        failed = {
            (one.asset, one.cause): one.images for one in self.count_outdated(recipes, have_failed)
        }
        left = [
            replace(one, images=one.images - failed.get((one.asset, one.cause), 0))
            for one in counted
        ]
        return [one for one in left if one.images > 0]

    def count_others(
        self, others: Mapping[str, Recipe], recipes: Mapping[str, Recipe], where: Filter = ALL
    ) -> list[Outdated]:
        """Counts what the images that `list_outdated` lists for some recipes need of other ones."""
        begun = self._select_outdated(recipes, where)
        with self._database.reading(self._is_patient) as connection:
            query = _count_results().where(MADE.image_id.in_(begun), MADE.asset.in_([*others]))
            groups = connection.execute(query).mappings().all()
        return [
            one
            for asset, recipe in others.items()
            for one in _sum_by_cause(asset, recipe, [g for g in groups if g["asset"] == asset])
        ]

    def count_all(self) -> int:
        """The number of images, whatever their status."""
        with self._database.reading(self._is_patient) as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(images)).scalar_one()

    def list_outdated(
        self,
        recipes: Mapping[str, Recipe],
        after_id: str,
        limit: int,
        where: Filter = ALL,
        except_tenants: TenantSet = NO_TENANTS,
        until_id: str | None = None,
    ) -> list[str]:
        """Up to `limit` completed images that need one of these assets, by ID, after one ID.

        If few of many images do, it reads all those up to `until_id`; see `find_later`.
        """
        query = (
            self._select_outdated(recipes, where, is_by_id=True)
            .where(MADE.image_id > after_id, leave_out(except_tenants))
            .order_by(MADE.image_id)
            .limit(limit)
        )
        if until_id is not None:
            query = query.where(MADE.image_id <= until_id)
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())

    def find_later(self, after_id: str) -> str | None:
        """The ID up to which one statement looks for outdated images; None if it is the last."""
        query = sa.select(images.c.id).where(images.c.id > after_id).order_by(images.c.id)
        with self._database.reading() as connection:
            return connection.execute(query.offset(LOOKED_THROUGH - 1).limit(1)).scalar()

    def iterate_outdated(
        self,
        recipes: Mapping[str, Recipe],
        where: Filter = ALL,
        except_tenants: TenantSet = NO_TENANTS,
    ) -> Iterator[str]:
        """All images that `list_outdated` lists, read a few hundred at a time."""
        last_id: str | None = ""
        while last_id is not None:
            until_id = self.find_later(last_id)
            while found := self.list_outdated(
                recipes, last_id, READ_TOGETHER, where, except_tenants, until_id
            ):
                yield from found
                last_id = found[-1]
            last_id = until_id

    def count_images(self, recipes: Mapping[str, Recipe], where: Filter = ALL) -> int:
        """How many images `list_outdated` lists."""
        if where.conditions:
            return self._count(self._select_outdated(recipes, where))
        # Comparing all images takes seconds at a million, so those that have not completed are
        # counted by themselves. If every result of an asset is outdated, so is every image.
        counts, missing = Counter[str](), Counter[str]()
        for one in self.count_outdated(recipes):
            (missing if one.cause == MISSING else counts)[one.asset] += one.images
        total = self.count_all()
        whole = [asset for asset, count in counts.items() if count == total - missing[asset]]
        outdated = {asset: recipes[asset] for asset in whole[:1] or counts}
        if not outdated:
            return 0
        select = sa.select(MADE.image_id).where(_is_outdated(outdated))
        [first, *others] = outdated
        count = self._count(select.distinct()) if others else counts[first]
        unended = sa.select(images.c.id).where(
            images.c.status.in_([status for status in Status if status != Status.COMPLETED]),
            select.where(MADE.image_id == images.c.id).exists(),
        )
        return count - self._count(unended)

    def _count(self, query: sa.Select[tuple[str]]) -> int:
        with self._database.reading(self._is_patient) as connection:
            counted = sa.select(sa.func.count()).select_from(query.subquery())
            return connection.execute(counted).scalar_one()

    def draw_outdated(
        self, recipes: Mapping[str, Recipe], count: int, seed: int, where: Filter = ALL
    ) -> list[str]:
        """Up to `count` of the images that `list_outdated` lists, drawn at random, by ID.

        The same seed draws the same images of the same plan.
        """
        total = self.count_images(recipes, where)
        drawn = random.Random(seed).sample(range(1, total + 1), min(count, total))  # noqa: S311
        outdated = self._select_outdated(recipes, where).subquery()
        position = sa.func.row_number().over(order_by=outdated.c.image_id).label("position")
        numbered = sa.select(outdated.c.image_id, position).subquery()
        query = (
            sa.select(numbered.c.image_id)
            .where(numbered.c.position.in_(drawn))
            .order_by(numbered.c.image_id)
        )
        with self._database.reading(self._is_patient) as connection:
            return list(connection.execute(query).scalars())

    def _select_outdated(
        self, recipes: Mapping[str, Recipe], where: Filter, is_by_id: bool = False
    ) -> sa.Select[tuple[str]]:
        """The completed images that need one of these assets.

        With `is_by_id`, only the index of IDs is used: SQLite would read all completed images by
        that of the status.
        """
        status = images.c.status + "" if is_by_id else images.c.status
        return (
            sa.select(MADE.image_id)
            .distinct()
            .join(images, images.c.id == MADE.image_id)
            .where(_is_outdated(recipes), status == Status.COMPLETED, *self._build(where))
        )

    def _build(self, where: Filter) -> list[sa.ColumnElement[bool]]:
        return build_conditions(where, self._database.engine.dialect.name == "postgresql")


def _count_results() -> sa.Select[tuple[object, ...]]:
    """The number of results by what made them."""
    columns = (MADE.asset, MADE.provider, MADE.model, MADE.settings, MADE.is_stale)
    # In the order of the index, so that the database need not sort.
    return sa.select(*columns, sa.func.count().label("count")).group_by(*columns)


def _sum_by_cause(
    asset: str, recipe: Recipe, groups: Iterable[Mapping[Any, Any]]
) -> list[Outdated]:
    counts = Counter[str]()
    for group in groups:
        if cause := find_cause({**group}, recipe):
            counts[cause] += group["count"]
    return [Outdated(asset, cause, count) for cause, count in counts.items()]


def _is_outdated(recipes: Mapping[str, Recipe]) -> sa.ColumnElement[bool]:
    """Whether a result is one of these assets, but not what the asset's recipe would make."""
    return sa.or_(
        *(
            sa.and_(
                MADE.asset == asset,
                sa.or_(
                    MADE.provider != recipe.provider,
                    MADE.model != recipe.model,
                    MADE.settings != recipe.settings,
                    MADE.is_stale.is_(True),
                ),
            )
            for asset, recipe in recipes.items()
        )
    )
