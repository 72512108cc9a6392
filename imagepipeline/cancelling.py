"""Cancelling an image: on the Redis list, in the catalogue, or while a run works on it."""

from collections.abc import Sequence

from imagepipeline.errors import InvalidUploadError
from imagepipeline.models import Upload, check_image_id
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.uploads import UploadQueue


def cancel_image(
    catalogue: Catalogue,
    queue: UploadQueue,
    image_id: str,
    entries: Sequence[bytes],
    text: str,
    is_dry_run: bool,
) -> tuple[bool, str]:
    """Ends an image as `failed` with the reason `cancelled`, before or while a run processes it.

    A run under way finds its claim gone at its next write, and the reconciler ends it.

    Args:
        catalogue: where the image is.
        queue: where its entries wait.
        image_id: the image.
        entries: its entries on the list, from `UploadQueue.find_waiting`.
        text: the person's reason; may be empty.
        is_dry_run: change nothing.

    Returns:
        Whether it was, or would be, cancelled; and a sentence.
    """
    try:
        check_image_id(image_id)
    except InvalidUploadError as error:
        return False, f"left alone: {error}"
    state = catalogue.get_states([image_id]).get(image_id)
    if not entries and (state is None or state.status.has_ended):
        what = f"it is {state.status} already" if state else "no such image waits or runs"
        return False, f"left alone: {what}"
    if is_dry_run:
        waits = "waiting" if state is None or state.status.has_ended else state.status
        return True, f"would cancel ({waits})"
    taken = [entry for entry in entries if queue.withdraw(entry)]
    uploads = {entry: Upload.from_entry(entry) for entry in taken}
    refused = catalogue.find_owners(uploads)  # these would have become dead letters
    catalogue.accept(upload for entry, upload in uploads.items() if entry not in refused)
    sentence = f"a person cancelled it: {text}" if text else "a person cancelled it"
    was = catalogue.cancel(image_id, sentence)
    if was is None:
        return False, "left alone: it ended at this moment"
    return True, f"cancelled ({'waiting' if taken else was})"
