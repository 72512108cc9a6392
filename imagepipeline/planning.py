"""Plan and apply: what a change of model, prompt or sizes costs, and doing it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from imagepipeline.errors import StackError
from imagepipeline.filters import ALL, Filter
from imagepipeline.models import ASSETS, BULK_PRIORITY, Recipe, Status, now_utc
from imagepipeline.paid_calls import find_price
from imagepipeline.rates import parse_limits
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger, MeanUsage
from imagepipeline.stores.plans import Outdated, Plans

IN_FLIGHT = 10  # planned images that wait or run at once: the rest stays `completed` meanwhile
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Step:
    """What one asset needs for one cause, and what it will take.

    Attributes:
        calls: paid calls at most; none for local models and variants.
        tokens_in: of all calls, by the mean of earlier ones; None if there were none.
        tokens_out: likewise.
        cost_usd: of all calls, as reported or by price; None if it is not known.
        minutes: at the present rate limit; None without a limit.
    """

    asset: str
    cause: str
    images: int
    calls: int
    tokens_in: int | None
    tokens_out: int | None
    cost_usd: float | None
    minutes: float | None


def plan(
    plans: Plans,
    ledger: Ledger,
    recipes: Mapping[str, Recipe],
    prices: Mapping[str, tuple[float, float]],
    rate_limits: str,
    where: Filter = ALL,
) -> list[Step]:
    """What these images need; an image that needs several assets counts in each."""
    return [
        _estimate(outdated, recipes[outdated.asset], ledger, prices, rate_limits)
        for outdated in plans.count_outdated(recipes, where)
    ]


def _estimate(
    outdated: Outdated,
    recipe: Recipe,
    ledger: Ledger,
    prices: Mapping[str, tuple[float, float]],
    rate_limits: str,
) -> Step:
    asset, cause, count = outdated.asset, outdated.cause, outdated.images
    if recipe.provider == "local" or asset == "variants":
        return Step(asset, cause, count, 0, 0, 0, 0, 0)
    usage = ledger.find_mean_usage(asset, recipe.model) or MeanUsage(None, None, None)
    limits = [one for one in parse_limits(rate_limits) if one.stage in (None, asset)]
    cost_usd = usage.cost_usd
    price = find_price(recipe.model, prices)
    if cost_usd is None and usage.tokens_in is not None and price:
        cost_usd = (usage.tokens_in * price[0] + (usage.tokens_out or 0) * price[1]) / 1e6
    return Step(
        asset=asset,
        cause=cause,
        images=count,
        calls=count,
        tokens_in=None if usage.tokens_in is None else round(count * usage.tokens_in),
        tokens_out=None if usage.tokens_out is None else round(count * usage.tokens_out),
        cost_usd=None if cost_usd is None else round(count * cost_usd, 6),
        minutes=round(count / limits[0].count * limits[0].seconds / 60, 1) if limits else None,
    )


@dataclass(frozen=True)
class Applied:
    """How far an apply is: images begun and ended, and US dollars spent since it began."""

    begun: int
    completed: int
    failed: int
    spent_usd: float


def apply(
    plans: Plans,
    catalogue: Catalogue,
    ledger: Ledger,
    recipes: Mapping[str, Recipe],
    limit: int | None = None,
    budget_usd: float | None = None,
    clock: Callable[[], datetime] = now_utc,
    where: Filter = ALL,
) -> Iterator[Applied]:
    """Has the stack do what completed images need, a few at a time, after all uploads.

    Runs make only what is not current, so one that is stopped anywhere goes on with the next call.

    Args:
        plans: finds the images.
        catalogue: begins their generations.
        ledger: knows what was spent.
        recipes: of the assets that count.
        limit: stop after so many images; None for all.
        budget_usd: begin no image once this was spent since the start; those in flight end.
        clock: gives the time.
        where: which images may be begun.

    Raises:
        StackError: the stack made something else than was planned.
    """
    since = clock()
    in_flight: set[str] = set()
    begun = completed = failed = 0
    last_id, is_exhausted = "", False
    while True:
        room = IN_FLIGHT - len(in_flight)
        left = room if limit is None else min(room, limit - begun)
        spent_usd = round(ledger.sum_cost_usd(since), 6)
        if budget_usd is not None and spent_usd >= budget_usd:
            is_exhausted = True
        if left > 0 and not is_exhausted:
            found = plans.list_outdated(recipes, last_id, left, where)
            is_exhausted = len(found) < left
            last_id = found[-1] if found else last_id
            started = catalogue.begin_planned(found, BULK_PRIORITY)
            in_flight.update(started)
            begun += len(started)
        for image_id, state in catalogue.get_states(sorted(in_flight)).items():
            if state.status in (Status.COMPLETED, Status.FAILED):
                in_flight.remove(image_id)
                completed += state.status == Status.COMPLETED
                failed += state.status == Status.FAILED
                if state.status == Status.COMPLETED:
                    _check_made(catalogue, image_id, recipes)
        yield Applied(begun, completed, failed, spent_usd)
        if not in_flight and (is_exhausted or begun == limit):
            return
        time.sleep(POLL_SECONDS)


def _check_made(catalogue: Catalogue, image_id: str, recipes: Mapping[str, Recipe]) -> None:
    causes = catalogue.find_causes(image_id, recipes)
    if outdated := [asset for asset, cause in causes.items() if cause]:
        raise StackError(
            f"{image_id} was processed, but its {' and '.join(outdated)} were not made as planned: "
            "the stack runs with other settings than this command; restart it with the same ones"
        )


def explain_unknown_cost(steps: Sequence[Step]) -> str | None:
    """Why a budget could not be kept: an asset whose calls have no known cost. None if all have."""
    unknown = [step.asset for step in steps if step.calls and step.cost_usd is None]
    if not unknown:
        return None
    return (
        f"the cost of {' and '.join(dict.fromkeys(unknown))} is unknown, so no budget can be kept: "
        "set IMAGEPIPELINE_PRICES, or if the provider reports costs, run `plan --sample 5` first"
    )


def select_recipes(recipes: Mapping[str, Recipe], assets: Sequence[str]) -> dict[str, Recipe]:
    """The recipes of these assets, in the order of a run; of all assets if none is named."""
    return {asset: recipes[asset] for asset in ASSETS if not assets or asset in assets}


def explain_image(
    catalogue: Catalogue, image_id: str, recipes: Mapping[str, Recipe]
) -> list[dict[str, Any]]:
    """What one image needs: a row per asset with its recipe today, what made it, and the cause."""
    row = catalogue.get(image_id)
    made_by = row["made_by"] if row else {}
    causes = catalogue.find_causes(image_id, recipes)
    return [
        {
            "asset": asset,
            "cause": causes[asset] or "current",
            "made_by": made_by.get(asset, {}).get("version", ""),
            "today": recipe.version,
        }
        for asset, recipe in recipes.items()
    ]
