"""The command that erases images."""

import sys
from typing import Any

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
from imagepipeline.errors import InvalidUploadError
from imagepipeline.models import check_image_id
from imagepipeline.opening import open_catalogue, open_queue
from imagepipeline.settings import Settings
from imagepipeline.text import to_json


@click.command(epilog=EPILOG)
@click.argument("image_ids", nargs=-1, required=True, type=to_text)
@dry_run_option
@json_option
@with_settings
def erase(settings: Settings, image_ids: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Remove all that shows images or tells of them, for good: there is no way back.

    That is original, variants, rows, vectors and their old versions, and Dagster's runs with their
    events. A run that works on an image is cancelled first. The receipt says what was removed and
    what remains. Push an erased ID again only after its receipt.
    """
    from imagepipeline.runtime import services

    try:
        chosen = [check_image_id(image_id) for image_id in dict.fromkeys(image_ids)]
    except InvalidUploadError as error:
        raise click.UsageError(str(error)) from None
    open_catalogue(settings)
    open_queue(settings).count()
    receipts = services.erase(settings, chosen, dry_run)
    if as_json:
        say(to_json(receipts))
    else:
        say(*(line for receipt in receipts for line in describe_receipt(receipt)))
    if not all(receipt["is_known"] for receipt in receipts):
        sys.exit(EXIT_FAILED)


def describe_receipt(receipt: dict[str, Any]) -> list[str]:
    """A receipt as lines to read."""
    if not receipt["is_known"]:
        return [f"{receipt['id']}: nothing is known of it"]
    rows = ", ".join(f"{count} of {table}" for table, count in sorted(receipt["rows"].items()))
    parts = {
        "files": ", ".join(receipt["files"]),
        "rows": rows,
        "vectors": receipt["vectors"] and f"{receipt['vectors']}, with their old versions",
        "Dagster": receipt["runs"] and f"{receipt['runs']} runs with their events",
        "Redis list": receipt["entries"] and f"{receipt['entries']} entries",
    }
    done, removed = (
        ("would be erased", "removes") if receipt["is_dry_run"] else ("was erased", "removed")
    )
    return [
        f"{receipt['id']} {done}",
        *(f"  {removed}  {name}: {part}" for name, part in parts.items() if part),
        *(f"  remains  {sentence}" for sentence in receipt["remains"]),
    ]
