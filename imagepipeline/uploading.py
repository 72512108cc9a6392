"""Uploads from the command line: stores originals, pushes their IDs, and finds lost ones."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from imagepipeline.errors import ImagePipelineError, InvalidUploadError, PostponedError, StackError
from imagepipeline.models import check_original_path, choose_extension
from imagepipeline.opening import open_catalogue, open_queue
from imagepipeline.settings import Settings
from imagepipeline.storage import Storage, hash_original, open_storage

Report = Callable[[str], None]


def build_image_id(photo: Path) -> str:
    """A readable ID: the file name and 8 digits of the content's SHA-256, which make it unique."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", photo.stem).strip("-")[:50] or "image"
    return f"{name}-{hashlib.sha256(_read(photo)).hexdigest()[:8]}"


def _read(photo: Path) -> bytes:
    if not photo.is_file():  # a pipe would block, and a device may never end
        raise ImagePipelineError(f"{photo} is not a plain file: save it as one, and push that")
    return photo.read_bytes()


def enqueue(
    settings: Settings,
    images: Mapping[str, Path],
    priority: int,
    report: Report,
    tenant: str = "",
    focus: tuple[float, float] | None = None,
) -> None:
    """Stores each photo as its image's original, then pushes the ID.

    Raises:
        StackError: Redis does not take an ID; the message says which original is stored already.
    """
    queue = open_queue(settings)
    files = open_storage(settings.storage)
    for image_id, photo in images.items():
        path = files.put_original(image_id, _read(photo), choose_extension(photo.name))
        _replace_others(settings, files, image_id, path, report)
        try:
            queue.enqueue(image_id, path, priority, tenant, focus)
        except StackError as error:
            raise StackError(f"{error}; {path} is stored and not enqueued: push it again") from None


def _replace_others(
    settings: Settings, files: Storage, image_id: str, path: str, report: Report
) -> None:
    """Deletes an image's older originals of another extension, unless a run may be reading them."""
    others = [other for other in files.find_originals_of(image_id) if other != path]
    if not others:
        return
    try:
        state = open_catalogue(settings).get_states([image_id]).get(image_id)
    except (StackError, PostponedError):
        may_be_read = True
    else:
        may_be_read = state is not None and not state.status.has_ended
    for other in others:
        if may_be_read:
            advice = f"delete it before you push {image_id} by its ID alone"
            report(f"{other} is kept, as a run may be reading it: {advice}")
        else:
            files.delete(other)


@dataclass(frozen=True)
class Swept:
    """The enqueued IDs, and the deleted temporary files by their absolute paths or URLs."""

    enqueued: list[str]
    deleted: list[str]


def sweep(settings: Settings, is_dry_run: bool, report: Report) -> Swept:
    """Enqueues originals that are new to the catalogue, and deletes half-written files.

    `report` is told what is left alone and why. A dry run returns what would be done.
    """
    files, queue = open_storage(settings.storage), open_queue(settings)
    originals = files.list_originals()
    for image_id, file in list(originals.items()):
        try:
            check_original_path(file.path)
        except InvalidUploadError as error:
            report(str(error))
            del originals[image_id]
    paths = {image_id: file.path for image_id, file in originals.items()}
    catalogue = open_catalogue(settings)
    lost = catalogue.find_unknown(paths)
    replaced = catalogue.find_replaced(originals)
    for image_id, known in catalogue.find_known(replaced).items():
        if not _is_original(files, image_id, paths[image_id], *known):
            lost[image_id] = paths[image_id]
    leftovers = files.list_leftovers()
    if not is_dry_run:
        for image_id, path in lost.items():
            queue.enqueue(image_id, path)
        for leftover in list(leftovers):
            try:
                files.delete(leftover)
            except OSError as error:
                report(f"{leftover} cannot be deleted: {error.strerror}")
                leftovers.remove(leftover)
    return Swept(sorted(lost), [files.locate(path) for path in leftovers])


def _is_original(
    files: Storage, image_id: str, path: str, known_path: str | None, sha256: str | None
) -> bool:
    """Whether the image was made of that file, or of another one that is still there.

    A copied file looks new: only its content tells.
    """
    if known_path not in (None, path) and known_path in files.find_originals_of(image_id):
        return True
    # It has no hash if it has just gone.
    return sha256 is not None and hash_original(files, path) in (sha256, None)
