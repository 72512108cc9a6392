"""Commands about uploads and the images in the catalogue."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from imagepipeline import uploading
from imagepipeline.commands.shared import (
    EPILOG,
    EXIT_FAILED,
    MAX_LISTED,
    dry_run_option,
    json_option,
    note,
    say,
    tenant_option,
    to_text,
    with_settings,
)
from imagepipeline.errors import ImagePipelineError, InvalidUploadError
from imagepipeline.models import PRIORITY_LIMIT, Status, Upload, now_utc
from imagepipeline.opening import open_catalogue, open_queue
from imagepipeline.settings import Settings
from imagepipeline.text import to_json

UNENDED = ("id", "status", "priority", "generation", "attempts", "accepted_at", "not_before")
LIST_COLUMNS: dict[str | None, Sequence[str]] = {
    None: ("id", "status", "updated_at", "generation", "attempts", "reason", "error"),
    "waiting": ("id", "path", "priority", "copies", "entry", "error"),
    "pending": (*UNENDED, "error"),
    "processing": (*UNENDED, "run_id"),
    "dead": ("id", "updated_at", "copies", "reason", "entry"),
}
SHOWN = {  # the others are only in the JSON
    *("id", "status", "updated_at", "accepted_at", "reason", "error"),
    *("path", "priority", "copies", "entry", "run_id"),
}
photo_type = click.Path(exists=True, readable=True, path_type=Path)


def _parse_focus(
    _: click.Context, __: click.Parameter, value: str | None
) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        x, y = map(float, value.split(","))
        return Upload("image", focus=(x, y)).focus
    except (ValueError, InvalidUploadError):
        raise click.BadParameter(
            f"{value!r:.80} is not two numbers from 0 to 1 with a comma, such as 0.2,0.35: "
            "how far from the left and from the top"
        ) from None


@click.command(epilog=EPILOG)
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
@tenant_option
@click.option(
    "--focus",
    metavar="X,Y",
    callback=_parse_focus,
    help="What crops keep in view: how far from the left and the top, 0 to 1, such as 0.2,0.35.",
)
@click.option("--wait", "waits", is_flag=True, help="Show progress until every image has ended.")
@json_option
@with_settings
def push(
    settings: Settings,
    photos: Sequence[Path],
    image_id: str | None,
    priority: int,
    tenant: str,
    focus: tuple[float, float] | None,
    waits: bool,
    as_json: bool,
) -> None:
    """Store PHOTOS as originals and enqueue their IDs.

    Of a folder, all images in it and below are pushed; for thousands, use `import`. A photo that is
    pushed again is processed again: at once, or after the run that processes it.
    """
    photos = [found for photo in photos for found in find_photos(settings, photo)]
    if image_id is not None and len(photos) != 1:
        raise click.UsageError("--id names one image: push one PHOTO with it")
    if image_id is not None:
        try:
            Upload(image_id)
        except InvalidUploadError as error:
            raise click.UsageError(str(error)) from None
    open_queue(settings).count()  # where Redis does not answer, no original is left behind
    if not photos:
        raise ImagePipelineError("there is no image to push")
    images = {image_id or uploading.build_image_id(photo): photo for photo in photos}
    if waits:
        from imagepipeline import display

        began = time.monotonic()
        results = push_and_follow(settings, images, priority, time.sleep, tenant, focus)
        display.show_results(results, time.monotonic() - began, as_json)
        exit_by(results)
        return
    uploading.enqueue(settings, images, priority, note, tenant, focus)
    rows = [{"image_id": image_id, "photo": str(photo)} for image_id, photo in images.items()]
    say(*([to_json(rows)] if as_json else images))


@click.command(epilog=EPILOG)
@click.argument("image_id", required=False, type=to_text)
@click.option("--watch", is_flag=True, help="Show it again every second until Ctrl-C.")
@click.option("--verbose", is_flag=True, help="Show everything that is known about IMAGE_ID.")
@json_option
@with_settings
def status(
    settings: Settings, image_id: str | None, watch: bool, verbose: bool, as_json: bool
) -> None:
    """Count the images by status, or show what is known about IMAGE_ID.

    \b
    waiting     pushed, not yet in the catalogue
    pending     in the catalogue, waiting for a run
    processing  a run is processing it
    completed   metadata, variants and embedding are stored
    failed      given up, by reason; `status ID` says why
    dead        malformed entries of the Redis list; the newest 1000 are kept
    dropped     only if there were more: how many older ones were dropped
    throughput  how many images ended in the last minute
    time left   at this throughput, for all that waits and runs
    tenant      only if uploads name tenants: what each has waiting, and its costs today
    paused      only during a pause: why, and until when
    """
    from imagepipeline import display, overview
    from imagepipeline.runtime import supervisor
    from imagepipeline.stores.ledger import Ledger
    from imagepipeline.tenants import Tenants

    catalogue, ledger = open_catalogue(settings), Ledger(settings.database_url)
    shares = (settings.tenant_max_runs, settings.tenant_daily_budgets_usd)
    tenants = Tenants(catalogue, ledger, *shares)

    def read_stack() -> dict[str, Any]:
        counts: dict[str, Any] = dict(overview.count_images(settings, catalogue, note))
        counts |= overview.measure_progress(catalogue, counts)
        if used := tenants.list_used():
            counts["tenants"] = used
        return counts | overview.find_pause(settings, ledger)

    def read_image() -> dict[str, Any]:
        row = catalogue.get(str(image_id))
        if row is None:
            raise ImagePipelineError(f"no image {image_id!r:.80} is in the catalogue")
        return row

    def describe_image(row: Mapping[str, Any]) -> Mapping[str, Any]:
        return overview.describe_image(row, now_utc(), webserver_url)

    if image_id is None:
        display.show_status(read_stack, overview.describe_stack, as_json, watch)
        return
    webserver_url = (supervisor.find_running(settings) or {}).get("webserver_url")
    display.show_status(read_image, dict if verbose else describe_image, as_json, watch)


@click.command("list", epilog=EPILOG)
@click.option("--all", "is_all", is_flag=True, help="Include those that ended earlier.")
@click.option(
    "--status",
    "chosen",
    type=click.Choice(["waiting", *(status.value for status in Status), "dead"]),
    help="Only images of this status, whenever they ended.",
)
@click.option(
    "--limit",
    type=click.IntRange(1, MAX_LISTED),
    default=50,
    show_default=True,
    help="How many, with --status.",
)
@json_option
@with_settings
def list_images(
    settings: Settings, is_all: bool, chosen: str | None, limit: int, as_json: bool
) -> None:
    """List the images that completed within the last hour or failed within the last day.

    IMAGEPIPELINE_LIST_COMPLETED_HOURS and IMAGEPIPELINE_LIST_FAILED_HOURS change these times. With
    --status, list what waits, runs or has ended: `waiting` are entries of the Redis list that are
    not in the catalogue yet, `dead` those that could not be read. What has not ended comes in the
    order in which it goes on; what has ended, newest first.
    """
    from imagepipeline import display, overview

    catalogue = open_catalogue(settings)
    if chosen is None:
        rows = overview.list_finished(settings, catalogue, is_all, note)
    elif is_all:
        raise click.UsageError("give --all or --status: --status lists all images of a status")
    else:
        rows = overview.list_by_status(settings, catalogue, chosen, limit)
    columns = LIST_COLUMNS.get(chosen, LIST_COLUMNS[None])
    display.show_rows(rows, columns, as_json, shown=[name for name in columns if name in SHOWN])


@click.command(epilog=EPILOG)
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


@click.command(epilog=EPILOG)
@dry_run_option
@json_option
@with_settings
def sweep(settings: Settings, dry_run: bool, as_json: bool) -> None:
    """Enqueue originals whose push was lost, and delete temporary files of crashes.

    Use it if the Redis list was lost, or after a restore. It takes each file
    `original/<id>.<ext>` for an upload whose ID is not in the catalogue, or whose content has
    changed since the last push of its image.
    """
    swept = uploading.sweep(settings, dry_run, note)
    would = "would be " if dry_run else ""
    text = (
        f"{len(swept.enqueued)} originals {would}enqueued, "
        f"{len(swept.deleted)} temporary files {would}deleted"
    )
    done = asdict(swept) | {"dry_run": dry_run}
    say(*([to_json(done)] if as_json else [*swept.enqueued, text]))


@click.command(epilog=EPILOG)
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
    from imagepipeline import console, display
    from imagepipeline.index import open_index
    from imagepipeline.providers import embed_query

    if not text.strip():
        raise click.UsageError("TEXT is empty: say what to look for")
    catalogue = open_catalogue(settings)
    index, query = open_index(settings.index_uri), embed_query(settings, text, console.report)
    asked = count
    while True:
        found = index.nearest(query, asked)
        # A vector may outlive its image, such as one that a frozen run writes after an erasure.
        known = catalogue.find_known([neighbour.image_id for neighbour in found])
        neighbours = [neighbour for neighbour in found if neighbour.image_id in known][:count]
        if len(neighbours) == count or len(found) < asked:
            break
        asked *= 2
    display.show_neighbours(catalogue, neighbours, as_json)


def find_photos(settings: Settings, photo: Path) -> list[Path]:
    """The file itself, or the images of a folder; what is none is told."""
    if not photo.is_dir():
        return [photo]
    from imagepipeline import importing
    from imagepipeline.stores.files import FileStore

    source = importing.Source(FileStore(photo), "hash", settings.max_bytes)
    files = importing.find_images(source, lambda *_: None)
    for file in files:
        if file.error:
            note(f"{photo / file.name}: {file.error}")
    return [photo / file.name for file in files if not file.error]


def push_and_follow(
    settings: Settings,
    images: Mapping[str, Path],
    priority: int,
    pause: Callable[[float], None],
    tenant: str = "",
    focus: tuple[float, float] | None = None,
) -> list[dict[str, Any]]:
    """Enqueues photos by ID, shows progress until all have ended, and returns the results."""
    from imagepipeline import display

    catalogue = open_catalogue(settings)
    before = catalogue.get_states(list(images))
    uploading.enqueue(settings, images, priority, note, tenant, focus)
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
