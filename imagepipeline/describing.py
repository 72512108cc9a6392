"""How an image gets its metadata without its picture: from a twin, or by a translation."""

from collections.abc import Callable
from functools import partial

from imagepipeline.models import ImageMetadata, Recipe, VisionAnswer
from imagepipeline.needs import SETTINGS
from imagepipeline.services.vision import OpenAIVision, VisionModel
from imagepipeline.stores.catalogue import Catalogue


def find_source(
    catalogue: Catalogue, vision: VisionModel, image_id: str, sha256: str, cause: str | None
) -> tuple[ImageMetadata | None, Callable[[], VisionAnswer] | None]:
    """What is known of the original with this hash, whose metadata must be made for a cause.

    Returns:
        Metadata that today's recipe would make, if they can be had without a call; and the call
        that makes them from those of another list of languages, if that is the only difference.
    """
    if twin := catalogue.find_twin_metadata(vision.recipe, sha256):
        return twin, None
    if cause != SETTINGS or not isinstance(vision, OpenAIVision):
        return None, None
    row = catalogue.get(image_id) or {}
    known, made = ImageMetadata.read(row.get("metadata")), row["made_by"]["metadata"]
    if known is None or made["input_sha256"] != sha256:
        return None, None
    if not vision.can_translate(known, Recipe(made["provider"], made["model"], made["settings"])):
        return None, None
    if not vision.list_missing(known):
        return vision.translate(known).metadata, None
    return None, partial(vision.translate, known)
