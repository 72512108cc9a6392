"""What in the settings keeps the pipeline from doing what they ask for, as sentences."""

from imagepipeline.languages import DEFAULT
from imagepipeline.prices import explain_unpriced, find_price
from imagepipeline.settings import Settings


def explain_unpriced_models(settings: Settings) -> str | None:
    """Returns what to do if a budget is set but the settings lack the price of a model in use."""
    if not settings.has_budgets:
        return None
    models = [
        model
        for is_used, model in (
            (settings.has_remote_vision, settings.vision_model),
            (settings.has_remote_embedder, settings.embedding_model),
        )
        if is_used
    ]
    unpriced = [model for model in models if find_price(model, settings.all_prices) is None]
    return explain_unpriced(unpriced) if unpriced else None


def explain_languages(settings: Settings) -> str | None:
    """Returns what to do if the settings name languages that the vision model does not speak."""
    if settings.has_remote_vision or settings.languages == DEFAULT:
        return None
    return (
        "the offline vision model speaks only English, so descriptions are not made in "
        f"{', '.join(settings.languages)}: set OPENAI_API_KEY, or unset IMAGEPIPELINE_LANGUAGES"
    )
