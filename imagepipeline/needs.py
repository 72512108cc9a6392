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
