"""Plans: which results are not what today's settings would make, counted and listed in SQL."""

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from imagepipeline.models import Recipe, Status
from imagepipeline.needs import MISSING, find_cause
from imagepipeline.stores.database import Database
from imagepipeline.stores.tables import image_results, images

MADE = image_results.c


@dataclass(frozen=True)
class Outdated:
    """How many images need an asset for the same cause, one of `needs.CAUSES`."""

    asset: str
    cause: str
    images: int


class Plans:
    """Reads what the images in the catalogue's database need."""

    def __init__(self, url: str) -> None:
        self._database = Database(url)

    def count_outdated(self, recipes: Mapping[str, Recipe]) -> list[Outdated]:
        """Counts results by asset and cause; all images count, whatever their status."""
        columns = (MADE.asset, MADE.provider, MADE.model, MADE.settings, MADE.is_stale)
        # In the order of the index, so that the database need not sort.
        query = sa.select(*columns, sa.func.count().label("count")).group_by(*columns)
        with self._database.reading() as connection:
            groups = connection.execute(query).mappings().all()
            total = connection.execute(sa.select(sa.func.count()).select_from(images)).scalar_one()
        counts: dict[tuple[str, str], int] = {}
        for asset in recipes:
            made = [group for group in groups if group["asset"] == asset]
            counts[asset, MISSING] = total - sum(group["count"] for group in made)
            for group in made:
                if cause := find_cause({**group}, recipes[asset]):
                    counts[asset, cause] = counts.get((asset, cause), 0) + group["count"]
        return [Outdated(*key, count) for key, count in counts.items() if count]

    def count_all(self) -> int:
        """The number of images, whatever their status."""
        with self._database.reading() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(images)).scalar_one()

    def list_outdated(self, recipes: Mapping[str, Recipe], after_id: str, limit: int) -> list[str]:
        """Up to `limit` completed images that need one of these assets, by ID, after one ID."""
        query = (
            _select_outdated(recipes)
            .where(MADE.image_id > after_id)
            .order_by(MADE.image_id)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())

    def count_images(self, recipes: Mapping[str, Recipe]) -> int:
        """How many images `list_outdated` lists."""
        query = sa.select(sa.func.count()).select_from(_select_outdated(recipes).subquery())
        with self._database.reading() as connection:
            return connection.execute(query).scalar_one()


def _select_outdated(recipes: Mapping[str, Recipe]) -> sa.Select[tuple[str]]:
    """The completed images that need one of these assets."""
    is_outdated = sa.or_(
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
    return (
        sa.select(MADE.image_id)
        .distinct()
        .join(images, images.c.id == MADE.image_id)
        .where(is_outdated, images.c.status == Status.COMPLETED)
    )
