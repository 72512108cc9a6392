"""What an image needs: results that are missing, or not what today's settings would make."""

from collections.abc import Mapping
from typing import Any

from imagepipeline.models import Recipe

MISSING, MODEL, SETTINGS, INPUT = "missing", "model", "settings", "input"
CAUSES = {
    MISSING: "it was never made",
    MODEL: "another model made it",
    SETTINGS: "it was made with other settings: prompt, languages, sizes or quality",
    INPUT: "its input has changed: the original, or the text of the embedding",
}


def find_cause(made: Mapping[str, Any] | None, recipe: Recipe) -> str | None:
    """Why a result must be made, one of CAUSES; None if it is what the recipe would make.

    Args:
        made: its row of `image_results`, or None if there is none.
        recipe: what would make it today.
    """
    if made is None:
        return MISSING
    if (made["provider"], made["model"]) != (recipe.provider, recipe.model):
        return MODEL
    if made["settings"] != recipe.settings:
        return SETTINGS
    return INPUT if made["is_stale"] else None


def is_variant_current(
    variant: Mapping[str, Any], recipe: str, made: Mapping[str, Any] | None, input_sha256: str
) -> bool:
    """Whether a variant's row says that this recipe made its file of this original.

    Args:
        variant: its row of `image_variants`.
        recipe: what would make it today, in parts separated by commas.
        made: the row of `image_results` of all the image's variants, or None.
        input_sha256: the original.
    """
    if made is None or made["input_sha256"] != input_sha256:
        return False
    if variant["recipe"] is not None:
        return bool(variant["recipe"] == recipe)
    # Earlier versions recorded one recipe: six variants, then what holds for all.
    first, *options = recipe.split(",")
    together = made["settings"].split(",")
    return not made["is_stale"] and first in together[:6] and options == together[6:]
