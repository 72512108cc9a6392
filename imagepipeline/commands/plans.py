"""Commands about model changes: plan, apply."""

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from imagepipeline.commands.shared import (
    EPILOG,
    EXIT_FAILED,
    MAX_LISTED,
    json_option,
    note,
    say,
    to_text,
    with_settings,
)
from imagepipeline.errors import (
    ApplyBusyError,
    ImagePipelineError,
    InvalidFilterError,
    UnknownCostError,
)
from imagepipeline.filters import FIELDS, Filter
from imagepipeline.models import ASSETS, MAX_COUNT, Recipe
from imagepipeline.opening import open_catalogue, open_queue
from imagepipeline.prices import MAX_USD
from imagepipeline.settings import Settings
from imagepipeline.text import to_json

if TYPE_CHECKING:  # it takes as long to import as all else
    from imagepipeline.batch_calls import Fetched
    from imagepipeline.planning import Step
    from imagepipeline.sampling import Sample
    from imagepipeline.stores.applies import Applies
    from imagepipeline.stores.catalogue import Catalogue
    from imagepipeline.stores.plans import Plans

MAX_SAMPLED = 100  # a page of them has some 10 MB

asset_option = click.option(
    "--asset",
    "assets",
    multiple=True,
    type=click.Choice(ASSETS),
    help="Only images that need this asset; may be given several times. An image that begins gets "
    "everything it needs.",
)


def read_filter(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> Filter:
    """The filter that several options give."""
    try:
        return Filter.parse(map(to_text, texts))
    except InvalidFilterError as error:
        raise click.BadParameter(str(error)) from None


where_option = click.option(
    "--where",
    metavar="FIELD=VALUE",
    multiple=True,
    callback=read_filter,
    help="Only images with this value; if given several times, all must hold. Fields: "
    f"{', '.join(FIELDS)}. Dates are in UTC; id=abc* means all IDs that start with abc.",
)


def _check_page(_: click.Context, __: click.Parameter, page: Path | None) -> Path | None:
    """Finds out before anything is paid for whether the page can be written."""
    if page and not (page.parent.is_dir() and os.access(page.parent, os.W_OK)):
        raise click.BadParameter(f"{str(page.parent)!r:.200} is no folder that can be written to")
    return page


@click.command(epilog=EPILOG)
@click.argument("image_id", required=False, type=to_text)
@asset_option
@where_option
@click.option(
    "--sample",
    "count",
    metavar="N",
    type=click.IntRange(1, MAX_SAMPLED),
    help="Make N of the planned images, for money, and show old and new side by side. No image is "
    "changed; the paid answers are kept for `apply`.",
)
@click.option("--seed", type=int, help="Draw another sample: 1, 2, 3 … [default: 0]")
@click.option(
    "--page",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=_check_page,
    help="Also write the sample to this file, a web page with the pictures.",
)
@click.option("--discard", is_flag=True, help="Keep no answer of the sample for `apply`.")
@json_option
@with_settings
def plan(
    settings: Settings,
    image_id: str | None,
    assets: tuple[str, ...],
    where: Filter,
    count: int | None,
    seed: int | None,
    page: Path | None,
    discard: bool,
    as_json: bool,
) -> None:
    """Show which images are not what today's settings would make, and what it costs to make them.

    Nothing is changed. With IMAGE_ID, explain one image. Costs are the mean of earlier calls;
    --sample finds out.
    """
    from imagepipeline import display, planning
    from imagepipeline.providers import build_recipes
    from imagepipeline.stores.batches import Batches

    if not count and (seed is not None or page or discard):
        raise click.UsageError("--seed, --page and --discard need --sample")
    catalogue = open_catalogue(settings)
    all_recipes = build_recipes(settings)
    recipes = planning.select_recipes(all_recipes, assets)
    if image_id is not None:
        if where.conditions or count:
            raise click.UsageError("give an IMAGE_ID, or --where and --sample")
        if not catalogue.get_states([image_id]):
            raise ImagePipelineError(f"there is no image {image_id}")
        rows = planning.explain_image(catalogue, image_id, recipes)
        if not as_json:
            rows = [_make_readable(row) for row in rows]
        display.show_rows(rows, ("asset", "cause", "made_by", "today"), as_json)
        return
    if count:
        sample = make_sample(settings, catalogue, recipes, where, count, seed or 0, discard)
        if page:
            from imagepipeline.pages import build_sample_page

            page.write_text(build_sample_page(sample), encoding="utf-8")
        display.show_sample(sample, as_json)
        if any(trial.error for trial in sample.trials):
            sys.exit(EXIT_FAILED)
        return
    steps = make_plan(settings, all_recipes, where, assets)
    batches = Batches(settings.database_url)
    if problem := planning.explain_open_batches(batches, all_recipes):
        note(problem)
    if not steps and not as_json:
        say("All results are what today's settings would make.")
        return
    if others := dict.fromkeys(step.asset for step in steps if step.asset not in recipes):
        note(
            f"an image that begins gets everything it needs: these need {' and '.join(others)}, too"
        )
    rows = [
        asdict(step) | {"in_batches": batches.count_open(step.asset, all_recipes[step.asset])}
        for step in steps
    ]
    shown = ("asset", "cause", "images", "calls", "cost_usd", "minutes")
    columns = (*shown, "tokens_in", "tokens_out", "in_batches")
    display.show_rows(rows, columns if as_json else shown, as_json)


def make_sample(
    settings: Settings,
    catalogue: "Catalogue",
    recipes: Mapping[str, Recipe],
    where: Filter,
    count: int,
    seed: int,
    discard: bool,
) -> "Sample":
    """Tries some of the planned images, and shows progress on stderr."""
    from imagepipeline import console
    from imagepipeline.sampling import Sample, open_sampler
    from imagepipeline.stores.plans import Plans

    plans = Plans(settings.database_url)
    drawn = plans.draw_outdated(recipes, count, seed, where)
    with open_sampler(settings, catalogue, recipes, console.report) as sampler:
        trials = []
        for trial in sampler.try_images(drawn):
            trials.append(trial)
            console.report(f"{len(trials)} of {len(drawn)}: {trial.error or trial.image_id}")
        if discard:
            sampler.discard()
    return Sample(trials, plans.count_images(recipes, where))


def make_plan(
    settings: Settings, recipes: Mapping[str, Recipe], where: Filter, assets: Sequence[str]
) -> "list[Step]":
    """What these images need, at the present prices and rate limits."""
    from imagepipeline import planning
    from imagepipeline.providers import open_limiter
    from imagepipeline.stores.ledger import Ledger
    from imagepipeline.stores.plans import Plans

    with open_limiter(settings) as limiter:
        rate_limits = limiter.get_limits()
    plans, ledger = Plans(settings.database_url), Ledger(settings.database_url)
    return planning.plan(plans, ledger, recipes, settings.all_prices, rate_limits, where, assets)


def _check_budget(_: click.Context, __: click.Parameter, usd: float | None) -> float | None:
    if usd is not None and not 0 < usd <= MAX_USD:  # neither is NaN
        raise click.BadParameter(f"{usd:g} is not more than 0 and at most {MAX_USD:,} US dollars")
    return usd


@click.command(epilog=EPILOG)
@click.option("--limit", type=click.IntRange(1, MAX_COUNT), help="Stop after this many images.")
@click.option(
    "--budget", type=float, callback=_check_budget, help="Stop after this many US dollars."
)
@asset_option
@click.option("--stop", "is_stopped", is_flag=True, help="End the apply that is under way.")
@where_option
@click.option(
    "--batch",
    is_flag=True,
    help="First ask about all pictures in OpenAI's Batch API: at half the price, within a day. "
    "Embeddings are asked for as usual.",
)
@click.option("--dry-run", is_flag=True, help="Only list the images and count them.")
@json_option
@with_settings
def apply(
    settings: Settings,
    limit: int | None,
    budget: float | None,
    assets: tuple[str, ...],
    is_stopped: bool,
    where: Filter,
    batch: bool,
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
    from imagepipeline.stores.applies import Applies, ApplyProgress
    from imagepipeline.stores.plans import Plans

    catalogue = open_catalogue(settings)
    applies, plans = Applies(settings.database_url), Plans(settings.database_url)
    if is_stopped:
        stop_apply(applies, dry_run, as_json)
        return
    recipes = planning.select_recipes(build_recipes(settings), assets)
    if dry_run:
        list_planned(plans, recipes, where, limit, as_json)
        return
    open_queue(settings).count()  # no stack runs without Redis, and this would wait for one
    if batch and "metadata" not in recipes:
        raise click.UsageError("--batch asks about pictures, so it needs --asset metadata, too")
    await_turn(applies)
    applier = planning.build_applier(settings)
    if budget:
        try:
            applier.check_costs(assets, where)
        except UnknownCostError as error:
            raise click.UsageError(str(error)) from None
    spent_usd, problem = 0.0, ""
    if batch:
        fetched = fetch_batches(settings, catalogue, recipes, where, limit, budget)
        limit, spent_usd = fetched.images, fetched.spent_usd
        if not limit:
            problem = "Nothing is planned, or the budget allows no call."
        elif budget is not None and spent_usd >= budget:
            problem = "The budget is used up; the next apply uses the answers that are paid."
    if problem:
        say(problem, err=True)
        last = ApplyProgress(0, 0, 0, round(spent_usd, 6))
    else:
        begun, total = applier.start(
            assets, limit, budget, where, planning.LEASE_SECONDS, spent_usd
        )
        with contextlib.closing(planning.follow(applies, begun)) as steps:
            *_, last = display.follow_apply(steps, min(total, limit or total))
    display.show_rows([asdict(last)], tuple(asdict(last)), as_json)
    if last.failed:
        sys.exit(EXIT_FAILED)


def list_planned(
    plans: "Plans", recipes: Mapping[str, Recipe], where: Filter, limit: int | None, as_json: bool
) -> None:
    """Lists the images that an apply would begin, all as JSON or the first as text."""
    from imagepipeline import display

    found = ({"image_id": one} for one in plans.iterate_outdated(recipes, where))
    if as_json:
        display.stream_json(islice(found, limit))
        return
    shown = list(islice(found, limit or MAX_LISTED))
    display.show_rows(shown, ("image_id",), as_json)
    total = plans.count_images(recipes, where)
    more = "" if limit or total <= len(shown) else "; --json lists all"
    say(f"{len(shown):,} of {total:,} planned images{more}.", err=True)


def await_turn(applies: "Applies") -> None:
    """Waits until the lease of an apply whose command was killed has expired.

    Raises:
        ApplyBusyError: an apply is under way: its lease is renewed, or it has none.
    """
    from imagepipeline import planning

    first = now = applies.find_open()
    if first and first.expires_at:
        say(
            f"Note: {first.describe()}. If that command was killed, this one begins within "
            f"{planning.LEASE_SECONDS} s.",
            err=True,
        )
    while first and now:
        if now.expires_at is None or now.expires_at != first.expires_at:
            raise ApplyBusyError(now.explain_busy())
        time.sleep(planning.POLL_SECONDS)
        now = applies.find_open()


def fetch_batches(
    settings: Settings,
    catalogue: "Catalogue",
    recipes: Mapping[str, Recipe],
    where: Filter,
    limit: int | None,
    budget: float | None,
) -> "Fetched":
    """Fetches answers in batches, and shows progress; gives the last."""
    from imagepipeline import display
    from imagepipeline.batch_calls import open_batch_calls

    with open_batch_calls(settings, catalogue) as calls:
        try:
            *_, last = display.follow_batches(calls.fetch(recipes, where, limit, budget))
        except KeyboardInterrupt:
            say("Open batches go on at the provider: `apply --batch` continues.", err=True)
            raise
    return last


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


def _make_readable(row: Mapping[str, str]) -> dict[str, str]:
    """A row of one image's plan with recipes that may be folded between their parts."""
    readable = {name: text.replace(":", " ").replace(",", ", ") for name, text in row.items()}
    return readable | ({"today": "the same"} if row["made_by"] == row["today"] else {})
