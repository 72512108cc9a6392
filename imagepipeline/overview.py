"""What is going on in a stack and what is known of an image, for `status` and `list`."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from imagepipeline.errors import InvalidUploadError, PostponedError, StackError, explain_next
from imagepipeline.models import ASSETS, Status, Upload
from imagepipeline.opening import open_queue
from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger
from imagepipeline.tenants import describe_used

MAX_LISTED = 1000
Report = Callable[[str], None]
RATE_WINDOW = timedelta(minutes=1)
LISTED = ("waiting", *Status, "dead")
SHOWN_BYTES = 80  # of an entry that cannot be read


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


def measure_progress(catalogue: Catalogue, counts: Mapping[str, int | None]) -> dict[str, Any]:
    """How fast images end, how long the rest takes at that rate, and why images failed.

    Returns:
        `images_per_minute`, over the last minute; `minutes_left`, None if nothing ends or nothing
        is left; `failures`, the number of failed images by reason, most frequent first.
    """
    since = datetime.now(UTC) - RATE_WINDOW
    rate = sum(catalogue.count_events(event, since) for event in ("completed", "failed"))
    left = sum(counts[name] or 0 for name in ("waiting", Status.PENDING, Status.PROCESSING))
    return {
        "images_per_minute": rate,
        "minutes_left": round(left / rate, 1) if rate and left else None,
        "failures": catalogue.count_failures(),
    }


def describe_stack(counts: Mapping[str, Any]) -> dict[str, str]:
    """What `count_images`, `measure_progress`, `Tenants.list_used` and `find_pause` gave."""
    lines = {
        name: "unknown" if counts[name] is None else f"{counts[name]:,}"
        for name in ("waiting", *Status, "dead", "dropped")
        if name in counts
    }
    if counts["failures"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts["failures"].items())
        lines["failed"] += f" ({reasons})"
    lines["throughput"] = f"{counts['images_per_minute']:,} images in the last minute"
    if counts["minutes_left"] is not None:
        lines["time left"] = describe_minutes(counts["minutes_left"])
    for row in counts.get("tenants", ()):
        lines[f"tenant {row['tenant'] or '(none)'}"] = describe_used(row)
    return lines | ({"paused": counts["paused"]} if "paused" in counts else {})


def describe_minutes(minutes: float) -> str:
    """A duration that is an estimate, such as `about 3 minutes`."""
    if minutes < 1:
        return "less than a minute"
    hours = minutes / 60
    return f"about {hours:.0f} hours" if hours >= 2 else f"about {minutes:.0f} minutes"


def describe_age(at: datetime, now: datetime) -> str:
    """How long ago something was, such as `3 min ago`."""
    seconds = max(0, (now - at).total_seconds())
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def count_bytes(size: int) -> str:
    """A number of bytes to three digits, such as `95.2 kB`."""
    value, units = float(size), ["B", "kB", "MB", "GB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def find_largest(variants: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The widest variant, in the format in which it is smallest; None without variants."""
    return min(variants, key=lambda one: (-one["width"], one["size"]), default=None)


def locate_image(webserver_url: str, image_id: str) -> str:
    """The address of an image's partition in the Dagster UI."""
    return f"{webserver_url}/assets/original?view=partitions&partition={quote(image_id)}"


def describe_image(
    row: Mapping[str, Any], now: datetime, webserver_url: str | None
) -> dict[str, str]:
    """What a person wants to know of an image, about twelve lines: a row of `Catalogue.get`."""
    described = row["metadata"] or {}
    lines = {
        "image": row["id"],
        "tenant": row["tenant"],
        "status": row["status"],
        "changed": f"{describe_age(row['updated_at'], now)}, at {row['updated_at']:%F %T} UTC",
        "reason": row["reason"],
        "error": row["error"],
        "next": _explain_next(row),
        "flaw": row["flaw"],
        "original": _describe_original(row),
        "description": described.get("description"),
        "tags": ", ".join(map(str, described.get("tags", []))),
        "category": described.get("category"),
        "mood": described.get("mood"),
        **{
            f"{label} ({tag})": wording.get(name)
            for tag, wording in described.get("languages", {}).items()
            for name, label in (("description", "description"), ("altText", "alt text"))
        },
        "colours": " ".join(map(str, described.get("dominantColors", []))),
        "variants": _describe_variants(row),
        "made by": ", ".join(
            f"{asset}: {row['made_by'][asset]['model']}"
            for asset in ASSETS
            if asset in row["made_by"]
        ),
        "run": row["run_id"]
        and f"{row['run_id']}, generation {row['generation']}, attempts {row['attempts']}",
        "in the UI": _explain_gone(row)
        or (webserver_url and locate_image(webserver_url, row["id"])),
    }
    return {name: str(line) for name, line in lines.items() if line}


def _explain_gone(row: Mapping[str, Any]) -> str | None:
    """How an image that has left Dagster comes back; None for others."""
    is_gone = Status(row["status"]).has_ended and row["in_dagster"] is None
    return f"not any more: `imagepipeline restore {row['id']}`" if is_gone else None


def _explain_next(row: Mapping[str, Any]) -> str | None:
    """What a person can do, or what happens by itself."""
    if row["status"] == Status.FAILED:
        return explain_next(row["id"], row["reason"])
    if row["status"] == Status.PENDING:
        wait = f" after {row['not_before']:%T} UTC" if row["not_before"] else ""
        return f"a run starts{wait}, by priority ({row['priority']}) and age"
    return None


def _describe_original(row: Mapping[str, Any]) -> str | None:
    if row["original_bytes"] is None:
        return str(row["requested_path"]) if row["requested_path"] else None
    size = count_bytes(row["original_bytes"])
    return f"{row['path']}, {row['width']} x {row['height']} px, {size}"


def _describe_variants(row: Mapping[str, Any]) -> str | None:
    largest = find_largest(row["variants"])
    if largest is None:
        return None
    file_count = sum(not variant["is_alias"] for variant in row["variants"])
    line = (
        f"{file_count} files; largest {largest['width']} x {largest['height']} px, "
        f"{count_bytes(largest['size'])} {largest['format'].upper()}"
    )
    if not row["original_bytes"]:
        return line
    return f"{line} ({1 - largest['size'] / row['original_bytes']:.0%} saved)"


def find_pause(settings: Settings, ledger: Ledger) -> dict[str, str]:
    """Why all work or paid work is paused, as one entry `paused`; none if it is not.

    An exhausted rate limit counts as a pause.
    """
    if full := ledger.find_full_pause():
        return {"paused": f"all work, by a person at {full.since:%F %R} UTC: {full.message}"}
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


def list_by_status(
    settings: Settings, catalogue: Catalogue, status: str, limit: int
) -> list[dict[str, Any]]:
    """The rows of at most `limit` images of one of LISTED.

    What has not ended comes in the order in which it goes on, what has ended newest first.

    Raises:
        StackError: Redis does not answer, for `waiting` and `dead`.
    """
    if status == "waiting":
        entries = open_queue(settings).read(limit)
        return [_describe_entry(entry, copies) for entry, copies in entries.items()]
    if status == "dead":
        return [
            {
                "id": letter["id"],
                "reason": letter["reason"],
                "entry": letter["entry"],
                "copies": letter["copies"],
                "updated_at": datetime.fromtimestamp(letter["at"], UTC),
            }
            for letter in open_queue(settings).list_dead()[:limit]
        ]
    if Status(status).has_ended:
        return catalogue.list_ended(Status(status), limit=limit)
    return catalogue.list_unended(Status(status), limit)


def _describe_entry(entry: bytes, copies: int) -> dict[str, Any]:
    """An entry of the Redis list; `error` says why it will become a dead letter."""
    try:
        upload = Upload.from_entry(entry)
    except InvalidUploadError as error:
        shown = entry[:SHOWN_BYTES].decode(errors="replace")
        return {"id": None, "entry": shown, "copies": copies, "error": str(error)}
    return {
        "id": upload.image_id,
        "path": upload.path,
        "priority": upload.priority,
        "tenant": upload.tenant,
        "copies": copies,
        "error": None,
    }
