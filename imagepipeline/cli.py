"""The command line: parse, call, print. Imports what a command needs when it runs, so that `push` starts at once."""

import contextlib
import functools
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imagepipeline.errors import ImagePipelineError, PostponedError, SettingsError, StackError
from imagepipeline.models import PRIORITY_LIMIT, Status
from imagepipeline.settings import Settings

if TYPE_CHECKING:
    from imagepipeline.services.embedder import Embedder
    from imagepipeline.stores.catalogue import Catalogue
    from imagepipeline.stores.uploads import UploadQueue

EXIT_FAILED, EXIT_SETTINGS, EXIT_STACK, EXIT_INTERRUPTED = 1, 3, 4, 130
EPILOG = """\b
Exit codes: 0 all went well; 1 an image failed or is unknown; 2 wrong usage;
3 a setting is malformed; 4 the stack cannot be started or reached; 130 interrupted."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
photo_type = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)


def main() -> None:
    """Runs the command line; errors of ours become one line and an exit code."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)
    except SettingsError as error:
        click.echo(f"Setting: {error}", err=True)
        sys.exit(EXIT_SETTINGS)
    except (StackError, PostponedError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(EXIT_STACK)
    except ImagePipelineError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(EXIT_FAILED)


@click.group(epilog=EPILOG)
@click.version_option(package_name="imagepipeline")
def cli() -> None:
    """Background processing for image uploads: metadata, variants and an embedding for every image.

    \b
    Try it:                imagepipeline demo
    Run it:                imagepipeline up
    Then, elsewhere:       imagepipeline push PHOTO.jpg --wait
                           imagepipeline search "a boat at sunset"

    All state lives in one folder, .imagepipeline or IMAGEPIPELINE_HOME.
    """


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the validated settings as its first argument."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return command(Settings.load(), *args, **kwargs)

    return wrapper


@cli.command(epilog=EPILOG)
@click.argument("photos", nargs=-1, type=photo_type)
@click.option("--exit", "exits", is_flag=True, help="Stop the stack after the table instead of waiting for Ctrl-C.")
@json_option
@with_settings
def demo(settings: Settings, photos: Sequence[Path], exits: bool, as_json: bool) -> None:
    """Start the stack, run PHOTOS through it, and show what came of them.

    Without PHOTOS it takes five small ones that come with the package.
    """
    from importlib.resources import files

    from imagepipeline import display
    from imagepipeline.runtime.supervisor import Stack

    photos = photos or sorted(Path(str(files("imagepipeline") / "demo_photos")).glob("*.jpg"))
    with Stack(settings, display.report) as stack:
        images = {build_image_id(photo): photo for photo in photos}
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
@click.option("--dev", is_flag=True, help="Restart the code server whenever the package's code changes.")
@json_option
@with_settings
def up(settings: Settings, dev: bool, as_json: bool) -> None:
    """Run the local stack until Ctrl-C or `imagepipeline down`; uploads under way are finished first."""
    from imagepipeline import display
    from imagepipeline.runtime.supervisor import Stack

    with Stack(settings, display.report, reloads_code=dev) as stack:
        display.show_addresses(settings, stack.webserver_url, as_json)
        with contextlib.suppress(KeyboardInterrupt):
            stack.wait()


@cli.command(epilog=EPILOG)
@json_option
@with_settings
def down(settings: Settings, as_json: bool) -> None:
    """Stop the local stack of this home; uploads under way are finished first."""
    from imagepipeline.runtime import supervisor

    state = supervisor.find_running(settings)
    if state is not None:
        supervisor.stop_running(settings, state["pid"])
    text = "stopped" if state is not None else f"no stack uses {settings.home}"
    click.echo(json.dumps({"was_running": state is not None}) if as_json else text)


@cli.command(epilog=EPILOG)
@click.argument("photos", nargs=-1, required=True, type=photo_type)
@click.option("--id", "image_id", help="The image's ID; by default the file name and a hash of its content.")
@click.option(
    "--priority", type=click.IntRange(-PRIORITY_LIMIT, PRIORITY_LIMIT), default=0, help="Higher is run sooner."
)
@click.option("--wait", "waits", is_flag=True, help="Show progress until every image has ended.")
@json_option
@with_settings
def push(
    settings: Settings, photos: Sequence[Path], image_id: str | None, priority: int, waits: bool, as_json: bool
) -> None:
    """Store PHOTOS as originals and enqueue their IDs.

    A photo that is pushed again is done again, unless it still waits or runs: then nothing changes.
    """
    if image_id is not None and len(photos) != 1:
        raise click.UsageError("--id names one image: push one PHOTO with it")
    images = {image_id or build_image_id(photo): photo for photo in photos}
    if waits:
        from imagepipeline import display

        began = time.monotonic()
        results = push_and_follow(settings, images, priority, pause=time.sleep)
        display.show_results(results, time.monotonic() - began, as_json)
        exit_by(results)
        return
    enqueue(settings, images, priority)
    rows = [{"image_id": image_id, "photo": str(photo)} for image_id, photo in images.items()]
    click.echo(json.dumps(rows) if as_json else "\n".join(images))


@cli.command(epilog=EPILOG)
@click.argument("image_id", required=False)
@click.option("--watch", is_flag=True, help="Show it again every second until Ctrl-C.")
@json_option
@with_settings
def status(settings: Settings, image_id: str | None, watch: bool, as_json: bool) -> None:
    """Count the images by status, or show all that is known of IMAGE_ID.

    \b
    waiting     pushed, and not yet in the catalogue
    pending     in the catalogue, waiting for a run
    processing  a run is working on it
    completed   metadata, variants and embedding are in place
    failed      ended without; `status ID` says why
    dead        entries of the Redis list that could not be read
    """
    from imagepipeline import display

    catalogue = open_catalogue(settings)

    def read() -> dict[str, Any]:
        if image_id is None:
            return count_images(settings, catalogue)
        row = catalogue.get(image_id)
        if row is None:
            raise ImagePipelineError(f"no image {image_id!r:.80} is in the catalogue")
        return row

    display.show_status(read, as_json, watch)


@cli.command(epilog=EPILOG)
@click.argument("text")
@click.option("-k", "count", type=click.IntRange(1, 1000), default=5, show_default=True, help="How many images.")
@json_option
@with_settings
def search(settings: Settings, text: str, count: int, as_json: bool) -> None:
    """Find the images whose descriptions are nearest in meaning to TEXT."""
    from imagepipeline import display
    from imagepipeline.stores.vectors import EmbeddingIndex

    if not text.strip():
        raise click.UsageError("TEXT is empty: say what to look for")
    catalogue = open_catalogue(settings)
    embedder = build_embedder(settings)
    neighbours = EmbeddingIndex(settings.index_uri).nearest(embedder.embed(text), count)
    display.show_neighbours(catalogue, neighbours, as_json)


def count_images(settings: Settings, catalogue: "Catalogue") -> dict[str, int | None]:
    """The images by status, with what waits on the Redis list; None for the latter while Redis is down."""
    queue: Mapping[str, int | None]
    try:
        queue = open_queue(settings).count()
    except (StackError, PostponedError) as error:
        click.echo(f"Note: {error}", err=True)
        queue = {"waiting": None, "dead": None}
    return {"waiting": queue["waiting"], **catalogue.count(), "dead": queue["dead"]}


def push_and_follow(
    settings: Settings, images: Mapping[str, Path], priority: int, pause: Callable[[float], None]
) -> list[dict[str, Any]]:
    """Enqueues photos by ID, shows progress until all have ended, and gives what came of them."""
    from imagepipeline import display

    catalogue = open_catalogue(settings)
    before = catalogue.get_states(list(images))
    # An image that had ended begins a new generation: wait for the end of that one.
    awaited = {image_id: generation + status.has_ended for image_id, (generation, status) in before.items()}
    enqueue(settings, images, priority)
    display.follow(catalogue, {image_id: awaited.get(image_id, 1) for image_id in images}, pause)
    return display.collect_results(catalogue, list(images))


def exit_by(rows: Sequence[Mapping[str, Any]]) -> None:
    """Exits with 1 unless every image completed."""
    if any(row["status"] != Status.COMPLETED for row in rows):
        sys.exit(EXIT_FAILED)


def enqueue(settings: Settings, images: Mapping[str, Path], priority: int) -> None:
    """Stores each photo as its image's original, then pushes the ID."""
    from imagepipeline.stores.files import FileStore

    queue = open_queue(settings)
    files = FileStore(settings.storage_folder)
    for image_id, photo in images.items():
        extension = re.sub(r"[^a-z0-9]", "", photo.suffix.lower())[:8] or "bin"
        path = files.put_original(image_id, photo.read_bytes(), extension)
        queue.enqueue(image_id, path, priority)


def build_image_id(photo: Path) -> str:
    """An ID one can read: the file name, and 8 digits of the content's SHA-256 so that it is the photo's own."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", photo.stem).strip("-")[:50] or "image"
    return f"{name}-{hashlib.sha256(photo.read_bytes()).hexdigest()[:8]}"


def open_queue(settings: Settings) -> "UploadQueue":
    """The Redis lists; it connects when first used."""
    from imagepipeline.stores.uploads import UploadQueue

    return UploadQueue(settings.redis_url, settings.queue_prefix)


def open_catalogue(settings: Settings) -> "Catalogue":
    """The catalogue, known to answer."""
    from imagepipeline.stores.catalogue import Catalogue

    catalogue = Catalogue(settings.database_url)
    catalogue.check()
    return catalogue


def build_embedder(settings: Settings) -> "Embedder":
    """The embedder the pipeline uses, so that queries and images can be compared."""
    from imagepipeline.services.embedder import LocalEmbedder, OpenRouterEmbedder

    if settings.openrouter_api_key is None:
        return LocalEmbedder()
    key = settings.openrouter_api_key.get_secret_value()
    return OpenRouterEmbedder(key, settings.openrouter_base_url, settings.embedding_model)
