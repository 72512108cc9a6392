"""Commands that stop work and let it go on: cancel, pause, resume."""

import sys

import click

from imagepipeline.commands.shared import (
    EPILOG,
    EXIT_FAILED,
    dry_run_option,
    json_option,
    say,
    to_text,
    with_settings,
)
from imagepipeline.models import BY_PERSON
from imagepipeline.opening import open_catalogue, open_queue
from imagepipeline.settings import Settings
from imagepipeline.text import to_json

reason_option = click.option(
    "--reason", "text", type=to_text, default="", metavar="TEXT", help="Why; it is kept and shown."
)


@click.command(epilog=EPILOG)
@click.argument("image_ids", nargs=-1, required=True, type=to_text)
@reason_option
@dry_run_option
@json_option
@with_settings
def cancel(
    settings: Settings, image_ids: tuple[str, ...], text: str, dry_run: bool, as_json: bool
) -> None:
    """End images that wait or run as failed, with the reason `cancelled`.

    A run writes nothing more from then on, and ends within half a minute. Results that are in place
    stay. `failed retry`, or another push, processes the image again.
    """
    from imagepipeline.cancelling import cancel_image

    catalogue, queue = open_catalogue(settings), open_queue(settings)
    waiting = queue.find_waiting(set(image_ids))
    rows = []
    for image_id in dict.fromkeys(image_ids):
        entries = waiting.get(image_id, [])
        is_done, outcome = cancel_image(catalogue, queue, image_id, entries, text, dry_run)
        rows.append({"id": image_id, "is_cancelled": is_done, "outcome": outcome})
    lines = [f"{row['id']}  {row['outcome']}" for row in rows]
    say(*([to_json(rows)] if as_json else lines))
    if not all(row["is_cancelled"] for row in rows):
        sys.exit(EXIT_FAILED)


@click.command(epilog=EPILOG)
@reason_option
@dry_run_option
@json_option
@with_settings
def pause(settings: Settings, text: str, dry_run: bool, as_json: bool) -> None:
    """Start no run until `resume`. Runs under way finish, and uploads are taken in.

    Up to fifteen runs are queued already and count as under way. Runs that a person starts in the
    Dagster UI are not held back.
    """
    from imagepipeline.stores.ledger import Ledger

    open_catalogue(settings)
    ledger = Ledger(settings.database_url)
    message = text or "no reason was given"
    known = ledger.find_full_pause()
    if not dry_run:
        ledger.pause(BY_PERSON, message, None)
    done = {"reason": message, "was_paused": known is not None, "dry_run": dry_run}
    line = f"all work {'would be' if dry_run else 'is'} paused: {message}"
    say(to_json(done) if as_json else line)


@click.command(epilog=EPILOG)
@dry_run_option
@json_option
@with_settings
def resume(settings: Settings, dry_run: bool, as_json: bool) -> None:
    """End all pauses now: that of all work, and those of paid work, such as an empty account's."""
    from imagepipeline.stores.ledger import Ledger

    open_catalogue(settings)
    ledger = Ledger(settings.database_url)
    full = ledger.find_full_pause()
    pauses = [
        {"reason": pause.reason, "message": pause.message}
        for pause in ([full] if full else []) + ledger.list_pauses()
    ]
    if not dry_run:
        ledger.resume()
    lines = [
        f"{'would resume' if dry_run else 'resumed'} ({pause['reason']}): {pause['message']}"
        for pause in pauses
    ]
    done = {"pauses": pauses, "dry_run": dry_run}
    say(*([to_json(done)] if as_json else lines or ["nothing is paused"]))
