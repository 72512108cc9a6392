"""Commands about model changes: plan, apply."""

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from imagepipeline.commands.shared import (
    EPILOG,
    EXIT_FAILED,
    MAX_LISTED,
    json_option,
    say,
    to_text,
    with_settings,
)
from imagepipeline.errors import ImagePipelineError
from imagepipeline.models import ASSETS, Recipe
from imagepipeline.opening import open_catalogue
from imagepipeline.settings import Settings
from imagepipeline.text import to_json

if TYPE_CHECKING:  # it takes as long to import as all else
    from imagepipeline.planning import Step
    from imagepipeline.stores.applies import Applies

asset_option = click.option(
    "--asset",
    "assets",
    multiple=True,
    type=click.Choice(ASSETS),
    help="Only this asset; may be given several times.",
)


@click.command(epilog=EPILOG)
@click.argument("image_id", required=False, type=to_text)
@asset_option
@json_option
@with_settings
def plan(settings: Settings, image_id: str | None, assets: tuple[str, ...], as_json: bool) -> None:
    """Show which images are not what today's settings would make, and what it costs to make them.

    Nothing is changed. With IMAGE_ID, explain one image. Costs are the mean of earlier calls.
    """
    from imagepipeline import display, planning
    from imagepipeline.providers import build_recipes

    catalogue = open_catalogue(settings)
    recipes = planning.select_recipes(build_recipes(settings), assets)
    if image_id is not None:
        if not catalogue.get_states([image_id]):
            raise ImagePipelineError(f"there is no image {image_id}")
        rows = planning.explain_image(catalogue, image_id, recipes)
        display.show_rows(rows, ("asset", "cause", "made_by", "today"), as_json)
        return
    steps = make_plan(settings, recipes)
    if not steps and not as_json:
        say("All results are what today's settings would make.")
        return
    columns = ("asset", "cause", "images", "calls", "cost_usd", "minutes")
    display.show_rows([asdict(step) for step in steps], columns, as_json)


def make_plan(settings: Settings, recipes: Mapping[str, Recipe]) -> "list[Step]":
    """What all images need, at the present prices and rate limits."""
    from imagepipeline import planning
    from imagepipeline.providers import list_prices, open_limiter
    from imagepipeline.stores.ledger import Ledger
    from imagepipeline.stores.plans import Plans

    with open_limiter(settings) as limiter:
        rate_limits = limiter.get_limits()
    plans, ledger = Plans(settings.database_url), Ledger(settings.database_url)
    return planning.plan(plans, ledger, recipes, list_prices(settings), rate_limits)


@click.command(epilog=EPILOG)
@click.option("--limit", type=click.IntRange(min=1), help="Stop after this many images.")
@click.option(
    "--budget", type=click.FloatRange(min=0, min_open=True), help="Stop after this many US dollars."
)
@asset_option
@click.option("--stop", "is_stopped", is_flag=True, help="End the apply that is under way.")
@click.option("--dry-run", is_flag=True, help="Only list the images.")
@json_option
@with_settings
def apply(
    settings: Settings,
    limit: int | None,
    budget: float | None,
    assets: tuple[str, ...],
    is_stopped: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Have the running stack make what `plan` found, after all uploads.

    Only what is outdated is made: a new prompt renders no variants, and a text that did not change
    is not embedded again. Stop it with Ctrl-C; the next apply goes on. Images that have failed are
    left to `failed retry`.
    """
    from imagepipeline import display, planning
    from imagepipeline.providers import build_recipes
    from imagepipeline.stores.applies import Applies
    from imagepipeline.stores.plans import Plans

    open_catalogue(settings)
    applies, plans = Applies(settings.database_url), Plans(settings.database_url)
    if is_stopped:
        stop_apply(applies, dry_run, as_json)
        return
    recipes = planning.select_recipes(build_recipes(settings), assets)
    if dry_run:
        found = plans.list_outdated(recipes, "", limit or MAX_LISTED)
        display.show_rows([{"image_id": one} for one in found], ("image_id",), as_json)
        return
    if budget and (problem := planning.explain_unknown_cost(make_plan(settings, recipes))):
        raise click.UsageError(problem)
    total = plans.count_images(recipes)
    begun = applies.start(recipes, limit, budget, planning.LEASE_SECONDS)
    with contextlib.closing(planning.follow(applies, begun)) as steps:
        *_, last = display.follow_apply(steps, min(total, limit or total))
    display.show_rows([asdict(last)], tuple(asdict(last)), as_json)
    if last.failed:
        sys.exit(EXIT_FAILED)


def stop_apply(applies: "Applies", dry_run: bool, as_json: bool) -> None:
    """Ends the open apply and says what that did."""
    from imagepipeline import planning

    one = applies.find_open()
    if one and not dry_run:
        applies.end(one.id, planning.STOPPED)
    done = {"apply": one.id if one else None, "dry_run": dry_run}
    verb = "would be stopped" if dry_run else "was stopped"
    text = f"apply {one.id} {verb}; {one.begun_count} images were begun" if one else "no apply runs"
    say(to_json(done) if as_json else text)
