"""The command `import`."""

import os
import sys
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING

import click

from imagepipeline.commands.shared import (
    EPILOG,
    EXIT_FAILED,
    dry_run_option,
    json_option,
    say,
    tenant_option,
    to_text,
    with_settings,
)
from imagepipeline.errors import ImagePipelineError
from imagepipeline.opening import open_catalogue
from imagepipeline.settings import Settings
from imagepipeline.text import to_json

if TYPE_CHECKING:
    from imagepipeline.importing import Plan
    from imagepipeline.storage import Storage

MAX_SHOWN = 20  # problems in the table


@click.command("import", epilog=EPILOG)
@click.argument("source", metavar="FOLDER|URL")
@click.option("--copy", "mode", flag_value="copy", default="copy", help="Copy them (the default).")
@click.option("--move", "mode", flag_value="move", help="Delete each once it has been taken in.")
@click.option(
    "--link",
    "mode",
    flag_value="link",
    help="Make hard links, on one file system. Never change a linked file, only replace it.",
)
@click.option(
    "--id-from",
    type=click.Choice(["name", "path", "hash"]),
    default="name",
    show_default=True,
    help="The ID of 2026/cat.jpg: cat, 2026-cat, or the SHA-256 of its bytes.",
)
@tenant_option
@dry_run_option
@json_option
@with_settings
def import_images(
    settings: Settings,
    source: str,
    mode: str,
    id_from: str,
    tenant: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Take in all images of a FOLDER, or of a bucket such as s3://bucket/prefix.

    They are processed after all uploads. First every file is looked at, and what cannot be imported
    is told; the rest is imported all the same. Look with --dry-run first. Files whose names begin
    with a dot are left out, and symbolic links are not followed.

    It may be stopped at any time: run it again, and it goes on, or takes what is new. An image that
    is known is left as it is, and no original is replaced. The stack need not run.
    """
    from imagepipeline import display, importing
    from imagepipeline.storage import open_storage

    catalogue, files = open_catalogue(settings), open_storage(settings.storage)
    origin = importing.Source(open_source(settings, source, mode), id_from, settings.max_bytes)
    with display.show_progress() as progress:
        planned = importing.plan(origin, files, catalogue, progress)
    if not as_json:
        show_plan(planned)
    told = {file.name for file in planned.problems}
    if not dry_run:
        if mode == "copy":
            check_room(planned, files)
        with display.show_progress() as progress:
            importing.carry_out(
                planned, origin, files, catalogue, importing.Mode(mode), progress, tenant
            )
    show_result(planned, told, dry_run, as_json)
    if planned.problems:
        sys.exit(EXIT_FAILED)


def open_source(settings: Settings, source: str, mode: str) -> "Storage":
    """The folder or bucket that a person named.

    Raises:
        UsageError: it is no folder, is the storage itself, or cannot be linked.
    """
    from imagepipeline.storage import open_storage

    root = source.removeprefix("file://").rstrip("/") or "/"
    storage = settings.storage
    if "://" not in root:
        root, storage = os.path.realpath(root), os.path.realpath(storage)
        if not Path(root).is_dir():
            raise click.UsageError(f"{to_text(source)} is not a folder")
    if mode == "link" and ("://" in root or "://" in storage):
        raise click.UsageError("--link needs a folder, and a storage root in a folder")
    if is_below(root, storage):
        raise click.UsageError(
            f"{to_text(source)} is in the storage root: `sweep` takes in the originals there"
        )
    hidden = any(part.startswith(".") for part in storage.removeprefix(root).split("/"))
    if is_below(storage, root) and not hidden:
        raise click.UsageError(f"the storage root, {storage}, is in {to_text(source)}")
    return open_storage(root)


def is_below(path: str, folder: str) -> bool:
    """Whether a path or URL is a folder or below it."""
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


def check_room(planned: "Plan", files: "Storage") -> None:
    """Raises ImagePipelineError if the copies will not fit on the disk."""
    from imagepipeline.importing import State
    from imagepipeline.overview import count_bytes

    needed, free = sum(file.size for file in planned.select(State.NEW)), files.free_bytes
    if free is not None and needed > free:
        raise ImagePipelineError(
            f"the copies need {count_bytes(needed)}, and {count_bytes(free)} are free: use "
            "--link or --move, or make room"
        )


def show_plan(planned: "Plan") -> None:
    """Prints what cannot be imported, and how many files there are of each kind."""
    from imagepipeline import display

    problems = planned.problems
    if problems:
        rows = [
            {"file": file.name, "problem": file.state.value, "error": file.error}
            for file in problems[:MAX_SHOWN]
        ]
        display.show_rows(rows, ("file", "problem", "error"), as_json=False)
        if len(problems) > MAX_SHOWN:
            say(f"and {len(problems) - MAX_SHOWN:,} more: --json lists all")
    counts = ", ".join(f"{count:,} {state}" for state, count in planned.count().items())
    say(f"{len(planned.files):,} files: {counts}" if counts else "There is no file.")


def show_result(planned: "Plan", told: Set[str], dry_run: bool, as_json: bool) -> None:
    """Prints what was done: of all files as JSON, and else numbers, and problems not yet told."""
    from imagepipeline.importing import State

    if as_json:
        files = [
            {
                "file": file.name,
                "image_id": file.image_id,
                "state": file.state.value,
                "error": file.error,
            }
            for file in planned.files.values()
        ]
        say(to_json({"dry_run": dry_run, "counts": planned.count(), "files": files}))
        return
    for file in planned.problems:
        if file.name not in told:
            say(f"{to_text(file.name)}: {file.error}")
    if not dry_run:
        say(
            f"{len(planned.select(State.IMPORTED)):,} images were imported; they are processed "
            "after all uploads: see `imagepipeline status`"
        )
