"""The command line: parse, call, print.

Commands import what they need when they run, so that `push` starts at once.
"""

import contextlib
import functools
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imagepipeline import uploading
from imagepipeline.errors import (
    ImagePipelineError,
    InvalidUploadError,
    PostponedError,
    SettingsError,
    StackError,
    list_reasons,
)
from imagepipeline.failures import UNREADABLE, Action, Failure, Failures
from imagepipeline.homes import secure_home
from imagepipeline.models import ASSETS, PRIORITY_LIMIT, Recipe, Status, Upload
from imagepipeline.opening import open_catalogue, open_queue
from imagepipeline.settings import Settings
from imagepipeline.text import make_printable, to_json

if TYPE_CHECKING:  # it takes as long to import as all else
    from imagepipeline.planning import Step

EXIT_FAILED, EXIT_SETTINGS, EXIT_STACK, EXIT_INTERRUPTED = 1, 3, 4, 130
MAX_LISTED = 1000  # failures
EPILOG = """\b
Exit codes: 0 all went well; 1 an image failed or is unknown; 2 wrong usage;
3 a setting is malformed; 4 the stack cannot be started or reached; 130 interrupted."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def to_text(argument: str) -> str:
    """An argument as text that can be stored; bytes that are not UTF-8 become question marks."""
    return argument.encode(errors="replace").decode()


photo_type = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)


def main() -> None:
    """Runs the command line; our own errors become one line and an exit code."""
    open_standard_streams()
    try:
        cli(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        silence_streams()
        sys.exit(EXIT_FAILED)  # as click and rich do
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)  # it quotes arguments, which may be file names that others chose
        say(*shown.getvalue().rstrip("\n").split("\n"), err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)
    except SettingsError as error:
        say(f"Setting: {error}", err=True)
        sys.exit(EXIT_SETTINGS)
    except (StackError, PostponedError) as error:
        say(*f"Error: {error}".split("\n"), err=True)
        sys.exit(EXIT_STACK)
    except ImagePipelineError as error:
        say(f"Error: {error}", err=True)
        sys.exit(EXIT_FAILED)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        say(f"Error: {error.strerror or type(error).__name__}{where}", err=True)
        sys.exit(EXIT_STACK)


def say(*lines: str, err: bool = False, nl: bool = True) -> None:
    """Prints lines of any origin; unprintable characters become spaces."""
    click.echo("\n".join(map(make_printable, lines)), nl=nl, err=err)


def note(problem: str) -> None:
    """Prints a problem that does not stop the command to stderr."""
    say(f"Note: {problem}", err=True)


def open_standard_streams() -> None:
    """Opens closed standard streams, so that no file of ours gets their descriptor."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which is this one
        if getattr(sys, name) is None:
            setattr(
                sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w", closefd=False)
            )


def silence_streams() -> None:
    """Discards buffered output, so that Python does not fail to flush it when it exits."""
    from imagepipeline import display

    for stream in (sys.stdout, sys.stderr):
        display.silence(stream)


@click.group(epilog=EPILOG)
@click.version_option(package_name="imagepipeline")
def cli() -> None:
    """Process uploaded images in the background: metadata, variants and an embedding for each.

    \b
    Try it:                imagepipeline demo
    Run it:                imagepipeline up
    Then, elsewhere:       imagepipeline push PHOTO.jpg --wait
                           imagepipeline search "a boat at sunset"

    All state is in one folder: .imagepipeline, or IMAGEPIPELINE_HOME.
    """


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Passes the settings to a command as its first argument, and makes the home private."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        settings = Settings.load()
        secure_home(settings)
        return command(settings, *args, **kwargs)

    return wrapper


@cli.command(epilog=EPILOG)
@click.argument("photos", nargs=-1, type=photo_type)
@click.option(
    "--exit",
    "exits",
    is_flag=True,
    help="Stop the stack after the table instead of waiting for Ctrl-C.",
)
@json_option
@with_settings
def demo(settings: Settings, photos: Sequence[Path], exits: bool, as_json: bool) -> None:
    """Start the stack, process PHOTOS and show the results.

    Without PHOTOS it processes five small ones that come with the package.
    """
    from importlib.resources import files

    from imagepipeline import display
    from imagepipeline.providers import build_embedder
    from imagepipeline.runtime.supervisor import Stack

    photos = photos or sorted(Path(str(files("imagepipeline") / "demo_photos")).glob("*.jpg"))
    with Stack(settings, display.report) as stack:
        images = {uploading.build_image_id(photo): photo for photo in photos}
        began = time.monotonic()
        rows = push_and_follow(settings, images, 0, pause=stack.wait)
        display.add_nearest(rows, settings, build_embedder(settings).recipe.version)
        display.show_results(rows, time.monotonic() - began, as_json)
        if not exits:
            display.show_addresses(settings, stack.webserver_url, as_json)
            with contextlib.suppress(KeyboardInterrupt):
                stack.wait()
    exit_by(rows)


@cli.command(epilog=EPILOG)
@click.option(
    "--dev", is_flag=True, help="Restart the code server whenever the package's code changes."
)
@json_option
@with_settings
def up(settings: Settings, dev: bool, as_json: bool) -> None:
    """Run the local stack until Ctrl-C or `imagepipeline down`; running uploads finish first."""
    from imagepipeline import display
    from imagepipeline.providers import explain_unpriced_models
    from imagepipeline.runtime.supervisor import Stack

    with Stack(settings, display.report, reloads_code=dev) as stack:
        if problem := explain_unpriced_models(settings):
            display.report(f"Paid work is paused: {problem}")
        display.show_addresses(settings, stack.webserver_url, as_json)
        with contextlib.suppress(KeyboardInterrupt):
            stack.wait()


@cli.command(epilog=EPILOG)
@json_option
@with_settings
def down(settings: Settings, as_json: bool) -> None:
    """Stop the local stack of this home; running uploads finish first."""
    from imagepipeline.runtime import supervisor

    state = supervisor.find_running(settings)
    if state is not None:
        supervisor.stop_running(settings, state["pid"])
    text = "stopped" if state is not None else f"no stack uses {settings.home}"
    say(to_json({"was_running": state is not None}) if as_json else text)


@cli.command(epilog=EPILOG)
@click.argument("photos", nargs=-1, required=True, type=photo_type)
@click.option(
    "--id", "image_id", help="The image's ID; by default the file name and a hash of its content."
)
@click.option(
    "--priority",
    type=click.IntRange(-PRIORITY_LIMIT, PRIORITY_LIMIT),
    default=0,
    help="Higher is run sooner.",
)
@click.option("--wait", "waits", is_flag=True, help="Show progress until every image has ended.")
@json_option
@with_settings
def push(
    settings: Settings,
    photos: Sequence[Path],
    image_id: str | None,
    priority: int,
    waits: bool,
    as_json: bool,
) -> None:
    """Store PHOTOS as originals and enqueue their IDs.

    A photo that is pushed again is processed again: at once, or after the run that processes it.
    """
    if image_id is not None and len(photos) != 1:
        raise click.UsageError("--id names one image: push one PHOTO with it")
    if image_id is not None:
        try:
            Upload(image_id)
        except InvalidUploadError as error:
            raise click.UsageError(str(error)) from None
    open_queue(settings).count()  # where Redis does not answer, no original is left behind
    images = {image_id or uploading.build_image_id(photo): photo for photo in photos}
    if waits:
        from imagepipeline import display

        began = time.monotonic()
        results = push_and_follow(settings, images, priority, pause=time.sleep)
        display.show_results(results, time.monotonic() - began, as_json)
        exit_by(results)
        return
    uploading.enqueue(settings, images, priority, note)
    rows = [{"image_id": image_id, "photo": str(photo)} for image_id, photo in images.items()]
    say(*([to_json(rows)] if as_json else images))


@cli.command(epilog=EPILOG)
@click.argument("image_id", required=False, type=to_text)
@click.option("--watch", is_flag=True, help="Show it again every second until Ctrl-C.")
@json_option
@with_settings
def status(settings: Settings, image_id: str | None, watch: bool, as_json: bool) -> None:
    """Count the images by status, or show everything about IMAGE_ID.

    \b
    waiting     pushed, not yet in the catalogue
    pending     in the catalogue, waiting for a run
    processing  a run is processing it
    completed   metadata, variants and embedding are stored
    failed      given up; `status ID` says why
    dead        malformed entries of the Redis list; the newest 1000 are kept
    dropped     only if there were more: how many older ones were dropped
    paused      only while paid work is paused: why, and until when
    """
    from imagepipeline import display, overview
    from imagepipeline.stores.ledger import Ledger

    catalogue, ledger = open_catalogue(settings), Ledger(settings.database_url)

    def read() -> dict[str, Any]:
        if image_id is None:
            counts = overview.count_images(settings, catalogue, note)
            return counts | overview.find_pause(settings, ledger)
        row = catalogue.get(image_id)
        if row is None:
            raise ImagePipelineError(f"no image {image_id!r:.80} is in the catalogue")
        return row

    display.show_status(read, as_json, watch)


@cli.command("list", epilog=EPILOG)
@click.option("--all", "is_all", is_flag=True, help="Include those that ended earlier.")
@json_option
@with_settings
def list_finished(settings: Settings, is_all: bool, as_json: bool) -> None:
    """List the images that completed within the last hour or failed within the last day.

    IMAGEPIPELINE_LIST_COMPLETED_HOURS and IMAGEPIPELINE_LIST_FAILED_HOURS change these times.
    """
    from imagepipeline import display, overview

    rows = overview.list_finished(settings, open_catalogue(settings), is_all, note)
    display.show_rows(
        rows, ("id", "status", "generation", "attempts", "reason", "error", "updated_at"), as_json
    )


@cli.command(epilog=EPILOG)
@click.argument("image_id", type=to_text)
@click.argument("priority", type=click.IntRange(-PRIORITY_LIMIT, PRIORITY_LIMIT))
@json_option
@with_settings
def prioritize(settings: Settings, image_id: str, priority: int, as_json: bool) -> None:
    """Change the PRIORITY of a pending image; higher runs sooner.

    Put `--` before a negative number. Up to fifteen images are queued as runs already; their order
    does not change.
    """
    catalogue = open_catalogue(settings)
    is_changed = catalogue.prioritize(image_id, priority)
    if not is_changed:
        state = catalogue.get_states([image_id]).get(image_id)
        if state is None:
            raise ImagePipelineError(f"no image {image_id!r:.80} is in the catalogue")
        raise ImagePipelineError(
            f"{image_id!r:.80} is {state.status}, not pending: only pending images have a priority"
        )
    row = {"image_id": image_id, "priority": priority}
    say(to_json(row) if as_json else f"{image_id} now has priority {priority}")


@cli.command(epilog=EPILOG)
@click.option("--dry-run", is_flag=True, help="Say what would be done, but change nothing.")
@json_option
@with_settings
def sweep(settings: Settings, dry_run: bool, as_json: bool) -> None:
    """Enqueue originals that are not in the catalogue, and delete temporary files of crashes.

    Use it if the Redis list was lost. It takes every file `original/<id>.<ext>` for an upload.
    """
    swept = uploading.sweep(settings, dry_run, note)
    would = "would be " if dry_run else ""
    text = (
        f"{len(swept.enqueued)} originals {would}enqueued, "
        f"{len(swept.deleted)} temporary files {would}deleted"
    )
    done = asdict(swept) | {"dry_run": dry_run}
    say(*([to_json(done)] if as_json else [*swept.enqueued, text]))


@cli.group(epilog=EPILOG)
def failed() -> None:
    """List failed images and unreadable entries, retry them, or discard them."""


reason_option = click.option(
    "--reason",
    type=click.Choice(sorted([*list_reasons(), UNREADABLE])),
    metavar="REASON",
    help="Only failures of this reason, such as provider_unavailable.",
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what would be done, but change nothing."
)
all_option = click.option(
    "--all", "is_all", is_flag=True, help="All failures, or all of the given reason."
)


@failed.command("list", epilog=EPILOG)
@reason_option
@json_option
@with_settings
def list_failed(settings: Settings, reason: str | None, as_json: bool) -> None:
    """List failures that were neither retried nor discarded.

    Unreadable entries of the Redis list have the reason `unreadable`.
    """
    from imagepipeline import display

    failures = open_failures(settings).iterate(reason)
    rows = [failure.row for failure in islice(failures, MAX_LISTED + 1)]
    if len(rows) > MAX_LISTED:
        say(f"Note: only the newest {MAX_LISTED} are listed", err=True)
    display.show_rows(
        rows[:MAX_LISTED],
        ("id", "reason", "error", "attempts", "retries", "updated_at"),
        as_json,
    )


@failed.command(epilog=EPILOG)
@click.argument("failure_id", type=to_text)
@json_option
@with_settings
def show(settings: Settings, failure_id: str, as_json: bool) -> None:
    """Show everything about one failure."""
    from imagepipeline import display

    row = open_failures(settings).get(failure_id).row
    display.show_status(lambda: row, as_json, False)


@failed.command(epilog=EPILOG)
@click.argument("failure_ids", nargs=-1, type=to_text)
@reason_option
@all_option
@dry_run_option
@json_option
@with_settings
def retry(
    settings: Settings,
    failure_ids: tuple[str, ...],
    reason: str | None,
    is_all: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Retry failed images, each at most five times a day.

    Images whose file is at fault are left alone, and named: push a better file.
    """
    failures = choose_failures(settings, failure_ids, reason, is_all)
    act_on_failures(failures, "retry", dry_run, as_json)


@failed.command(epilog=EPILOG)
@click.argument("failure_ids", nargs=-1, type=to_text)
@reason_option
@all_option
@dry_run_option
@json_option
@with_settings
def discard(
    settings: Settings,
    failure_ids: tuple[str, ...],
    reason: str | None,
    is_all: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove failures from the list.

    An image keeps its row and its history; an unreadable entry is deleted.
    """
    failures = choose_failures(settings, failure_ids, reason, is_all)
    act_on_failures(failures, "discard", dry_run, as_json)


@cli.command(epilog=EPILOG)
@click.argument("text", type=to_text)
@click.option(
    "-k",
    "count",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="How many images.",
)
@json_option
@with_settings
def search(settings: Settings, text: str, count: int, as_json: bool) -> None:
    """Find the images whose descriptions are nearest in meaning to TEXT."""
    from imagepipeline import display
    from imagepipeline.index import open_index
    from imagepipeline.providers import embed_query

    if not text.strip():
        raise click.UsageError("TEXT is empty: say what to look for")
    catalogue = open_catalogue(settings)
    neighbours = open_index(settings.index_uri).nearest(
        embed_query(settings, text, display.report), count
    )
    display.show_neighbours(catalogue, neighbours, as_json)


@cli.command(epilog=EPILOG)
@click.option(
    "--by", type=click.Choice(["model", "stage", "day"]), default="model", show_default=True
)
@click.option(
    "--since", type=click.DateTime(["%Y-%m-%d"]), help="Only calls on or after this day (UTC)."
)
@json_option
@with_settings
def costs(settings: Settings, by: str, since: datetime | None, as_json: bool) -> None:
    """Show what paid calls cost in US dollars, as reported or by IMAGEPIPELINE_PRICES.

    `calls` includes failed ones; `unpriced` counts those of unknown cost.
    """
    from imagepipeline import display
    from imagepipeline.stores.ledger import Ledger

    open_catalogue(settings)
    rows = Ledger(settings.database_url).summarize(by, since.replace(tzinfo=UTC) if since else None)
    rows = [
        row | {"cost_usd": round(row["cost_usd"], 6) if as_json else f"{row['cost_usd']:.6f}"}
        for row in rows
    ]
    display.show_rows(
        rows, (by, "calls", "answered", "tokens_in", "tokens_out", "cost_usd", "unpriced"), as_json
    )


asset_option = click.option(
    "--asset",
    "assets",
    multiple=True,
    type=click.Choice(ASSETS),
    help="Only this asset; may be given several times.",
)


@cli.command(epilog=EPILOG)
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


@cli.command(epilog=EPILOG)
@click.option("--limit", type=click.IntRange(min=1), help="Stop after this many images.")
@click.option(
    "--budget", type=click.FloatRange(min=0, min_open=True), help="Stop after this many US dollars."
)
@click.option("--dry-run", is_flag=True, help="Only list the images.")
@json_option
@with_settings
def apply(
    settings: Settings,
    limit: int | None,
    budget: float | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make what `plan` found, after all uploads, in a running stack.

    Only what is outdated is made: a new prompt renders no variants, and a text that did not change
    is not embedded again. Stop it with Ctrl-C; the next apply goes on. Images that have failed are
    left to `failed retry`.
    """
    from imagepipeline import display, planning
    from imagepipeline.providers import build_recipes
    from imagepipeline.stores.ledger import Ledger
    from imagepipeline.stores.plans import Plans

    catalogue, plans = open_catalogue(settings), Plans(settings.database_url)
    recipes = build_recipes(settings)
    if dry_run:
        found = plans.list_outdated(recipes, "", limit or MAX_LISTED)
        display.show_rows([{"image_id": one} for one in found], ("image_id",), as_json)
        return
    if budget and (problem := planning.explain_unknown_cost(make_plan(settings, recipes))):
        raise click.UsageError(problem)
    ledger = Ledger(settings.database_url)
    total = plans.count_images(recipes)
    steps = planning.apply(plans, catalogue, ledger, recipes, limit, budget)
    *_, last = display.follow_apply(steps, min(total, limit or total))
    display.show_rows([asdict(last)], tuple(asdict(last)), as_json)
    if last.failed:
        sys.exit(EXIT_FAILED)


@cli.command(epilog=EPILOG)
@click.argument("rate", required=False, type=to_text)
@click.option("--reset", is_flag=True, help="Return to IMAGEPIPELINE_RATE_LIMIT.")
@json_option
@with_settings
def limit(settings: Settings, rate: str | None, reset: bool, as_json: bool) -> None:
    """Show or change the RATE limit of paid calls, at once and for all processes: 20/minute, off.

    `metadata=10/minute,embedding=100/minute` sets one for each stage. It is kept in Redis until
    `--reset`.
    """
    from imagepipeline.providers import open_limiter
    from imagepipeline.rates import parse_limits

    if rate is not None and reset:
        raise click.UsageError("give a RATE, or --reset")
    try:
        parse_limits(rate or "off")
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    with open_limiter(settings) as limiter:
        if rate is not None or reset:
            limiter.set_limits(None if reset else rate)
        text = limiter.get_limits()
    say(to_json({"rate_limit": text}) if as_json else text)


@cli.command(epilog=EPILOG)
@click.option("--dry-run", is_flag=True, help="Say what would be done, but change nothing.")
@json_option
@with_settings
def resume(settings: Settings, dry_run: bool, as_json: bool) -> None:
    """End all pauses of paid work now, for example after topping up an account."""
    from imagepipeline.stores.ledger import Ledger

    open_catalogue(settings)
    ledger = Ledger(settings.database_url)
    pauses = [{"reason": pause.reason, "message": pause.message} for pause in ledger.list_pauses()]
    if not dry_run:
        ledger.resume()
    lines = [
        f"{'would resume' if dry_run else 'resumed'} ({pause['reason']}): {pause['message']}"
        for pause in pauses
    ]
    done = {"pauses": pauses, "dry_run": dry_run}
    say(*([to_json(done)] if as_json else lines or ["nothing is paused"]))


@cli.command(epilog=EPILOG)
@json_option
def doctor(as_json: bool) -> None:
    """Check everything the pipeline depends on, and say how to fix what is wrong.

    It asks each remote provider one tiny question, which may cost money. The exit code is 1 if
    anything is wrong.
    """
    from imagepipeline import display
    from imagepipeline.doctor import examine

    sys.exit(EXIT_FAILED if display.show_findings(examine(Settings.load()), as_json) else 0)


def choose_failures(
    settings: Settings, failure_ids: tuple[str, ...], reason: str | None, is_all: bool
) -> Iterable[Failure]:
    """The failures to act on: the named ones, those of a reason, or all."""
    if failure_ids and (reason or is_all):
        raise click.UsageError("name failures, or a --reason, or --all: not both")
    if not (failure_ids or reason or is_all):
        raise click.UsageError("name failures, or a --reason, or --all")
    failures = open_failures(settings)
    if failure_ids:
        return [failures.get(failure_id) for failure_id in dict.fromkeys(failure_ids)]
    return failures.iterate(reason)


def act_on_failures(
    failures: Iterable[Failure], action: Action, dry_run: bool, as_json: bool
) -> None:
    """Retries or discards failures, and prints each outcome as soon as it is known."""
    is_any_left = False
    if as_json:
        say("[", nl=False)
    for number, failure in enumerate(failures):
        is_done, outcome = failure.act(action, dry_run)
        is_any_left = is_any_left or not is_done
        if as_json:
            separator = ", " if number else ""
            said = to_json({"id": failure.row["id"], "outcome": outcome})
            say(separator + said, nl=False)
        else:
            say(f"{failure.row['id']}  {outcome}")
    if as_json:
        say("]")
    if is_any_left:
        sys.exit(EXIT_FAILED)


@cli.command(epilog=EPILOG)
@click.option(
    "--take-over",
    "is_taken_over",
    is_flag=True,
    help="Take over the catalogue of another Dagster instance.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, but change nothing.")
@json_option
@with_settings
def migrate(settings: Settings, is_taken_over: bool, dry_run: bool, as_json: bool) -> None:
    """Create or update the tables of the catalogue and of Dagster; `up` does so by itself.

    Run it before you start the services of a new version. If it runs elsewhere, it waits. A
    catalogue belongs to one Dagster instance: take it over only if the other one is gone for good,
    for example after its database was lost.
    """
    from imagepipeline.runtime import services

    databases = {
        "catalogue": "Postgres" if settings.explicit_database_url else "SQLite",
        "dagster": "Postgres" if settings.dagster_database_url else "SQLite",
    }
    if not dry_run:
        services.migrate(settings, is_taken_over)
    done = "would be brought" if dry_run else "are"
    lines = [f"{name}: the tables on {kind} {done} up to date" for name, kind in databases.items()]
    say(*([to_json({"databases": databases, "dry_run": dry_run})] if as_json else lines))


@cli.command(epilog=EPILOG)
@click.argument("name", type=click.Choice(["code-server", "worker", "daemon", "webserver"]))
@click.option(
    "--check",
    is_flag=True,
    help="Only check: exit with 0 if the service is healthy, with 4 if not.",
)
@json_option
@with_settings
def service(settings: Settings, name: str, check: bool, as_json: bool) -> None:
    """Run one service of the stack, for example in a container; `up` runs them all.

    Run `imagepipeline migrate` first, then the code server, one daemon, and any number of workers
    and webservers.
    """
    from imagepipeline.runtime import processes, services

    if not check:
        services.prepare(settings)
        if name in ("code-server", "worker"):
            services.check_redis(settings)
            services.check_catalogue(settings)
        command = services.build_command(settings, name)
        environment = services.build_environment(settings, name)
        processes.reset_signals()
        os.execve(command[0], command, environment)  # noqa: S606  (our own command)
    if not services.is_healthy(settings, name):
        raise StackError(f"{name} does not answer")
    say(to_json({"service": name, "is_healthy": True}) if as_json else f"{name} is healthy")


def push_and_follow(
    settings: Settings, images: Mapping[str, Path], priority: int, pause: Callable[[float], None]
) -> list[dict[str, Any]]:
    """Enqueues photos by ID, shows progress until all have ended, and returns the results."""
    from imagepipeline import display

    catalogue = open_catalogue(settings)
    before = catalogue.get_states(list(images))
    uploading.enqueue(settings, images, priority, note)
    # A run covers the pushes before its start: wait for one that started after our push.
    awaited = {
        image_id: before[image_id].pushes + 1 if image_id in before else 1 for image_id in images
    }
    display.follow(catalogue, awaited, pause)
    return display.collect_results(catalogue, list(images))


def exit_by(rows: Sequence[Mapping[str, Any]]) -> None:
    """Exits with 1 unless every image completed."""
    if any(row["status"] != Status.COMPLETED for row in rows):
        sys.exit(EXIT_FAILED)


def open_failures(settings: Settings) -> Failures:
    """Everything that has failed."""
    from imagepipeline.stores.failures import FailedImages

    images = FailedImages(settings.database_url)
    return Failures(open_catalogue(settings), images, open_queue(settings), note)


if __name__ == "__main__":
    main()
