"""Plan and apply: what a change of model, prompt or sizes costs, and doing it."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from imagepipeline.errors import BatchBusyError, StackError, UnknownCostError
from imagepipeline.filters import ALL, Filter
from imagepipeline.models import ASSETS, Recipe, TenantSet
from imagepipeline.prices import FREE, find_price
from imagepipeline.providers import build_recipes, build_tenants
from imagepipeline.rates import parse_limits
from imagepipeline.settings import Settings
from imagepipeline.stores.applies import Applies, Apply, ApplyProgress
from imagepipeline.stores.batches import Batches
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger, MeanUsage
from imagepipeline.stores.plans import Outdated, Plans

# Planned images that wait or run at once; the others stay `completed` meanwhile. Enough for two
# batch runs until the next tick.
MAX_IN_FLIGHT = 30
NO_PRICES: Mapping[str, tuple[float, float]] = MappingProxyType({})
POLL_SECONDS = 0.5
LEASE_SECONDS = 15  # then the apply of a command that was killed ends
DONE, LIMIT, BUDGET, STOPPED, OTHER_SETTINGS = "done", "limit", "budget", "stopped", "settings"


@dataclass(frozen=True)
class Step:
    """What one asset needs for one cause, and what it will take.

    Attributes:
        calls: paid calls at most; none for local models and variants.
        tokens_in: of all calls, by the mean of earlier ones; None if there were none.
        tokens_out: likewise.
        cost_usd: of all calls, as reported or by price; None if it is not known.
        minutes: at the present rate limits, which must all be kept; None without a limit.
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
    assets: Sequence[str] = (),
) -> list[Step]:
    """What these images need; an image that needs several assets counts in each.

    With assets, only images that need one of these; what else they need comes last.
    """
    chosen = select_recipes(recipes, assets)
    others = {asset: recipe for asset, recipe in recipes.items() if asset not in chosen}
    counted = plans.leave_out_failed(plans.count_outdated(chosen, where), chosen, where)
    if others:
        counted += plans.count_others(others, chosen, where)
    return [
        _estimate(outdated, recipes[outdated.asset], ledger, prices, rate_limits)
        for outdated in counted
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
    cost_usd = usage.estimate_usd(find_price(recipe.model, prices))
    return Step(
        asset=asset,
        cause=cause,
        images=count,
        calls=count,
        tokens_in=None if usage.tokens_in is None else round(count * usage.tokens_in),
        tokens_out=None if usage.tokens_out is None else round(count * usage.tokens_out),
        cost_usd=None if cost_usd is None else round(count * cost_usd, 6),
        minutes=max(
            (round(count / one.count * one.seconds / 60, 1) for one in limits), default=None
        ),
    )


class Applier:
    """Carries out the open apply: begins its images, as far as the bulk lane has room.

    Args:
        applies: knows the open apply.
        plans: finds its images.
        catalogue: begins their generations.
        ledger: knows what calls cost.
        batches: know what is asked of the provider and not answered yet.
        recipes: what the stack would make today, by asset.
        prices: US dollars per million tokens in and out, by model.
        find_spent: gives the tenants whose budget is used up. Their images are passed over, and
            those that have begun take no room.
    """

    def __init__(
        self,
        applies: Applies,
        plans: Plans,
        catalogue: Catalogue,
        ledger: Ledger,
        batches: Batches,
        recipes: Mapping[str, Recipe],
        prices: Mapping[str, tuple[float, float]] = NO_PRICES,
        find_spent: Callable[[], TenantSet] = TenantSet,
    ) -> None:
        self._find_spent = find_spent
        self._applies = applies
        self._plans = plans
        self._catalogue = catalogue
        self._ledger = ledger
        self._batches = batches
        self.recipes = recipes
        self._prices = prices
        self._paid = {
            asset: recipe
            for asset, recipe in recipes.items()
            if recipe.provider != "local" and find_price(recipe.model, prices) != FREE
        }

    @property
    def is_busy(self) -> bool:
        """Whether an apply is open."""
        return self._applies.find_open() is not None

    def start(
        self,
        assets: Sequence[str],
        max_images: int | None,
        budget_usd: float | None,
        where: Filter = ALL,
        lease_seconds: float | None = None,
        spent_usd: float = 0,
    ) -> tuple[Apply, int]:
        """Opens an apply as `Applies.start` does; gives it, and how many images need it.

        Raises:
            ApplyBusyError: another one is open.
            BatchBusyError: runs would ask again what open batches ask.
            UnknownCostError: the budget could not be kept.
        """
        if problem := explain_open_batches(self._batches, self.recipes):
            raise BatchBusyError(problem)
        if budget_usd is not None:
            self.check_costs(assets, where)
        recipes = select_recipes(self.recipes, assets)
        count = self._plans.count_images(recipes, where)
        apply = self._applies.start(
            recipes, max_images, budget_usd, where, lease_seconds, spent_usd
        )
        return apply, count

    def check_costs(self, assets: Sequence[str], where: Filter = ALL) -> None:
        """Checks that it is known what all calls cost that the images of an apply may need.

        These are not only those for the assets of the apply: an image that begins gets everything.

        Raises:
            UnknownCostError: a budget could not be kept.
        """
        chosen = select_recipes(self.recipes, assets)
        found = self._plans.count_others(self.recipes, chosen, where)
        needed = {one.asset for one in found}
        if "metadata" in needed:
            needed.add("embedding")  # of the new text
        unknown = [
            asset
            for asset, recipe in self._paid.items()
            if asset in needed and not self._has_known_cost(asset, recipe)
        ]
        if unknown:
            raise UnknownCostError(
                f"the cost of {' and '.join(unknown)} is unknown, so no budget can be kept: "
                "set IMAGEPIPELINE_PRICES, or if the provider reports costs, run `plan --sample 5` "
                "first"
            )

    def _has_known_cost(self, asset: str, recipe: Recipe) -> bool:
        if find_price(recipe.model, self._prices) is not None:
            return True
        usage = self._ledger.find_mean_usage(asset, recipe.model)
        return usage is not None and usage.cost_usd is not None

    def feed(self) -> str | None:
        """Begins the next images; returns a line for the log if the apply has ended."""
        apply = self._applies.find_open()
        if apply is None:
            return None
        reason = explain_end(apply, self.recipes)
        if reason is None and not self._begin(apply):
            reason = DONE
        if reason is None:
            return None
        self._applies.end(apply.id, reason)
        return f"Apply {apply.id} begins no more images ({reason})."

    def _begin(self, apply: Apply) -> bool:
        """Begins images, and returns whether there may be more.

        With a budget, those that need paid calls begin one at a time, until one has cost something:
        one whose answer is kept, or that fails, says nothing of the others.
        """
        spent = self._find_spent()
        in_flight = sum(self._catalogue.count_bulk(apply.id, spent).values())
        room = MAX_IN_FLIGHT - in_flight
        if apply.max_images is not None:
            room = min(room, apply.max_images - apply.begun_count)
        if apply.budget_usd is not None and apply.spent_usd:
            room = min(room, count_affordable(apply, in_flight))
        if room <= 0:
            return True
        recipes = {asset: self.recipes[asset] for asset in apply.recipes}
        until_id = self._plans.find_later(apply.last_id)
        found = self._plans.list_outdated(
            recipes, apply.last_id, room, apply.where, spent, until_id
        )
        if not found and until_id is not None:  # the next tick looks further
            self._applies.pass_over(apply.id, until_id)
            return True
        chosen = found
        if self._paid and apply.budget_usd is not None and not apply.spent_usd:
            free = [*takewhile(self._is_free, found)]
            chosen = free or found[: int(not in_flight)]
        if chosen:
            self._catalogue.begin_planned(chosen, apply.id)
        return bool(found)

    def _is_free(self, image_id: str) -> bool:
        return not any(self._catalogue.find_causes(image_id, self._paid).values())


def build_applier(settings: Settings) -> Applier:
    """An applier of what these settings would make."""
    url = settings.database_url
    return Applier(
        Applies(url),
        Plans(url),
        Catalogue(url),
        Ledger(url),
        Batches(url),
        build_recipes(settings),
        settings.all_prices,
        build_tenants(settings).find_spent,
    )


def explain_open_batches(batches: Batches, recipes: Mapping[str, Recipe]) -> str | None:
    """What today's models are asked in batches, and what to do, as a sentence; None if nothing."""
    count = sum(batches.count_open(*one) for one in recipes.items())
    if not count:
        return None
    return (
        f"batches with {count:,} questions are open at the provider, and runs would pay for them "
        "again: continue with `imagepipeline apply --batch`"
    )


def count_affordable(apply: Apply, in_flight: int) -> int:
    """How many more images an apply that has cost something may begin without overspending by far.

    By the mean cost of its images that have ended. When the budget is nearly spent, one at a time.
    """
    ended = apply.begun_count - in_flight
    left_usd = (apply.budget_usd or 0) - apply.spent_usd
    affordable = left_usd * ended / apply.spent_usd
    return max(1, int(min(MAX_IN_FLIGHT, affordable))) - in_flight


def explain_end(apply: Apply, recipes: Mapping[str, Recipe]) -> str | None:
    """Why an apply must begin no more images; None if it may."""
    if any(recipes[asset].version != version for asset, version in apply.recipes.items()):
        return OTHER_SETTINGS
    if apply.budget_usd is not None and apply.spent_usd >= apply.budget_usd:
        return BUDGET
    if apply.max_images is not None and apply.begun_count >= apply.max_images:
        return LIMIT
    return None


def follow(applies: Applies, apply: Apply) -> Generator[ApplyProgress]:
    """How far an apply is, twice a second, until all images that it began have ended.

    Renews its lease meanwhile. If it is closed earlier, the apply begins no more images.

    Raises:
        StackError: the stack would make something else than was planned.
    """
    try:
        while True:
            end_reason = applies.get(apply.id).end_reason
            progress = applies.measure(apply.id)
            yield progress
            if end_reason == OTHER_SETTINGS:
                raise StackError(
                    "the stack runs with other settings than this command, and would make other "
                    "results than were planned: restart it with the same settings"
                )
            if end_reason is not None and not progress.unfinished:
                return
            time.sleep(POLL_SECONDS)
            applies.renew(apply.id, LEASE_SECONDS)
    finally:
        applies.end(apply.id, STOPPED)


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
