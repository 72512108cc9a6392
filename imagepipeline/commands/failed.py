"""Commands about failures: list, show, retry, discard."""

import sys
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import click

from imagepipeline.commands.shared import (
    EPILOG,
    EXIT_FAILED,
    MAX_LISTED,
    dry_run_option,
    json_option,
    note,
    say,
    to_text,
    with_settings,
)
from imagepipeline.errors import list_reasons
from imagepipeline.failures import UNREADABLE, Action, Failure, Failures
from imagepipeline.opening import open_catalogue, open_queue
from imagepipeline.settings import Settings
from imagepipeline.text import to_json

reason_option = click.option(
    "--reason",
    type=click.Choice(sorted([*list_reasons(), UNREADABLE])),
    metavar="REASON",
    help="Only failures of this reason, such as provider_unavailable.",
)
all_option = click.option(
    "--all", "is_all", is_flag=True, help="All failures, or all of the given reason."
)


def choice_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the failures to act on, the settings, and how to act."""
    argument = click.argument("failure_ids", nargs=-1, type=to_text)
    decorated = with_settings(command)
    for decorate in (json_option, dry_run_option, all_option, reason_option, argument):
        decorated = decorate(decorated)
    return decorated


@click.group(epilog=EPILOG)
def failed() -> None:
    """List failed images and unreadable entries, retry them, or discard them."""


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
        shown=("id", "updated_at", "reason", "error"),
    )


@failed.command(epilog=EPILOG)
@click.argument("failure_id", type=to_text)
@json_option
@with_settings
def show(settings: Settings, failure_id: str, as_json: bool) -> None:
    """Show everything about one failure."""
    from imagepipeline import display

    row = open_failures(settings).get(failure_id).row
    display.show_status(lambda: row, dict, as_json, False)


@failed.command(epilog=EPILOG)
@choice_options
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
@choice_options
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


def open_failures(settings: Settings) -> Failures:
    """Everything that has failed."""
    from imagepipeline.stores.failures import FailedImages

    images = FailedImages(settings.database_url)
    return Failures(open_catalogue(settings), images, open_queue(settings), note)
