"""The command about events: show them, follow them, and send them to the webhook again."""

import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

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
from imagepipeline.models import MAX_COUNT
from imagepipeline.opening import open_events
from imagepipeline.settings import Settings
from imagepipeline.text import to_json

if TYPE_CHECKING:
    from imagepipeline.stores.events import EventLog, StoredEvent

FOLLOW_SECONDS = 0.5
SHOWN = 20  # the latest, unless `--since` says from where
# On Postgres, a transaction that began later may commit first: look back for what came late.
LOOK_BACK = 200
MAX_LINE = 160  # characters


@click.command(epilog=EPILOG)
@click.argument("image_id", required=False, type=to_text, metavar="[ID]")
@click.option("--follow", is_flag=True, help="Also show what happens from now on.")
@click.option(
    "--since",
    type=click.IntRange(0, MAX_COUNT),
    metavar="SEQ",
    help="Only events after this number, all.",
)
@click.option("--dead", is_flag=True, help="Only what the webhook has not taken within a day.")
@click.option("--resend", is_flag=True, help="Send the listed events to the webhook again.")
@dry_run_option
@json_option
@with_settings
def events(
    settings: Settings,
    image_id: str | None,
    follow: bool,
    since: int | None,
    dead: bool,
    resend: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Show what apps are told: pictures that are ready, images that completed, failed, were erased.

    Of one image or of all; by default the latest 20. Events are kept for three days. With --json,
    each line is an event with its number and when it was sent.
    """
    if resend and (follow or not (dead or image_id or since is not None)):
        raise click.UsageError("say what to resend: --dead, an ID or --since, without --follow")
    if dead and (follow or image_id or since is not None):
        raise click.UsageError("--dead lists all dead events: use it without --follow, ID or SEQ")
    log = open_events(settings)
    if resend and log.find_webhook() is None:
        say("Error: no webhook for events is set: IMAGEPIPELINE_EVENT_WEBHOOK_URL", err=True)
        sys.exit(EXIT_FAILED)
    tell_of_webhook(log)
    if dead:
        found = log.list_dead(MAX_LISTED)
    elif since is not None:
        found = log.list_after(image_id, since, MAX_LISTED)
    else:
        found = log.list_latest(image_id, LOOK_BACK)
    seen = {event.seq for event in found}
    found = found if dead or since is not None else found[-SHOWN:]
    for event in found:
        show(event, as_json)
    if len(found) == MAX_LISTED:
        note(f"only {MAX_LISTED} are listed: use --since {found[-1].seq} for the next")
    if resend:
        if not dry_run:
            log.resend(found)
        note(f"{len(found)} events {'would be' if dry_run else 'are'} sent again")
    if follow:
        last = found[-1].seq if found else since or 0
        for event in follow_events(log, image_id, last, seen):
            show(event, as_json)


def follow_events(
    log: "EventLog", image_id: str | None, last: int, seen: set[int]
) -> Iterator["StoredEvent"]:
    """Events after number `last` as they come in, without end."""
    while True:
        for event in log.list_after(image_id, max(0, last - LOOK_BACK), except_for=seen):
            seen.add(event.seq)
            last = max(last, event.seq)
            yield event
        seen = {number for number in seen if number > last - LOOK_BACK}
        time.sleep(FOLLOW_SECONDS)


def show(event: "StoredEvent", as_json: bool) -> None:
    """Prints an event as one line."""
    payload = json.loads(event.payload)
    if as_json:
        sent = {
            name: moment.isoformat() if moment else None
            for name, moment in (
                ("stream_sent_at", event.stream_sent_at),
                ("webhook_sent_at", event.webhook_sent_at),
            )
        }
        say(to_json({"seq": event.seq, **sent, "event": payload}))
        return
    text = payload["error"] or payload["description"] or ""
    reason = f"{payload['reason']}: " if payload["reason"] else ""
    say(
        f"{event.seq:>6}  {event.at:%F %T}  {event.type:<21} {event.image_id}  "
        f"generation {event.generation}  {reason}{text}"[:MAX_LINE].rstrip()
    )


def tell_of_webhook(log: "EventLog") -> None:
    """Notes on stderr that the webhook fails, if it does."""
    state = log.find_webhook()
    if state and state.failures:
        note(
            f"the webhook has failed {state.failures} times, and is tried again at "
            f"{state.due_at:%F %T} UTC: {state.problem}"
        )
