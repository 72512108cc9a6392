"""What is going on in a stack, in a few figures: for `status` and `list`."""

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from imagepipeline.errors import PostponedError, StackError
from imagepipeline.models import Status
from imagepipeline.opening import open_queue
from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger

MAX_LISTED = 1000
Report = Callable[[str], None]


def count_images(settings: Settings, catalogue: Catalogue, report: Report) -> dict[str, int | None]:
    """The images by status, and what waits on the Redis list: None while Redis is down."""
    counts: dict[str, int | None]
    dropped = 0
    try:
        queue = open_queue(settings)
        counts, dropped = dict(queue.count()), queue.count_dropped()
    except (StackError, PostponedError) as error:
        report(str(error))
        counts = {"waiting": None, "dead": None}
    row = {"waiting": counts["waiting"], **catalogue.count(), "dead": counts["dead"]}
    return row | ({"dropped": dropped} if dropped else {})


def find_pause(settings: Settings, ledger: Ledger) -> dict[str, str]:
    """Why paid work is paused, as one entry `paused`; none if it is not.

    An exhausted rate limit counts as a pause.
    """
    pauses = ledger.list_pauses()
    if pauses:
        until = f", until {pauses[0].until:%F %R} UTC" if pauses[0].until else ""
        return {"paused": f"{pauses[0].reason}{until}: {pauses[0].message}"}
    if not (settings.has_remote_vision or settings.has_remote_embedder):
        return {}
    from imagepipeline.providers import open_paid_calls  # here, as it imports the clients

    with open_paid_calls(settings) as paid_calls, contextlib.suppress(PostponedError):
        _, problem = paid_calls.count_affordable()
        return {"paused": f"rate_limit: {problem}"} if problem else {}
    return {}


def list_finished(
    settings: Settings, catalogue: Catalogue, is_all: bool, report: Report
) -> list[dict[str, Any]]:
    """The rows of images that ended, those that completed first; only the recent ones, or all."""
    now = datetime.now(UTC)
    rows = []
    for state, hours in (
        (Status.COMPLETED, settings.list_completed_hours),
        (Status.FAILED, settings.list_failed_hours),
    ):
        since = None if is_all else now - timedelta(hours=hours)
        rows += catalogue.list_ended(state, since, MAX_LISTED)
        if len(rows) >= MAX_LISTED:
            report(f"at most the newest {MAX_LISTED} of each status are listed")
    return rows
