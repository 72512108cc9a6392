"""Commands about what is forgotten: prune, restore."""

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
from imagepipeline.opening import open_catalogue
from imagepipeline.settings import Settings
from imagepipeline.text import to_json

LABELS = {
    "partitions": "images left Dagster, with their runs",
    "summaries": "images kept a summary of their runs",
    "runs": "other runs",
    "reports": "reports of sensors",
    "calls": "paid calls, whose sums stay",
    "notices": "sent notices",
}


@click.command(epilog=EPILOG)
@dry_run_option
@json_option
@with_settings
def prune(settings: Settings, dry_run: bool, as_json: bool) -> None:
    """Forget at once what is older than the settings IMAGEPIPELINE_KEEP_… say.

    The running stack does the same by itself, a little at a time. Rows, history, files and vectors
    of images stay, and so do the sums of costs. `restore` brings an image back to Dagster.
    """
    from imagepipeline.runtime import services

    open_catalogue(settings)
    pruned = services.prune(settings, dry_run)
    if as_json:
        say(to_json(pruned | {"dry_run": dry_run}))
        return
    counts = {name: count for name, count in pruned.items() if name in LABELS and count}
    if counts:
        say("would be pruned:" if dry_run else "pruned:")
    else:
        say("nothing to prune")
    say(*(f"  {count:,} {LABELS[name]}" for name, count in counts.items()))
    if pruned["waits_because"]:
        say(f"images wait: {pruned['waits_because']}")


@click.command(epilog=EPILOG)
@click.argument("image_ids", nargs=-1, required=True, type=to_text)
@dry_run_option
@json_option
@with_settings
def restore(settings: Settings, image_ids: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Bring images back to Dagster that have left it, with their last results.

    A push or an `apply` does so by itself.
    """
    from imagepipeline.runtime import services

    open_catalogue(settings)
    rows = services.restore(settings, list(dict.fromkeys(image_ids)), dry_run)
    say(*([to_json(rows)] if as_json else [f"{row['id']}  {row['outcome']}" for row in rows]))
    if not all(row["is_known"] for row in rows):
        sys.exit(EXIT_FAILED)
