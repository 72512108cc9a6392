"""Builds models, recipes, index, paid calls and notifiers from the settings."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from imagepipeline.index import EmbeddingStore, open_index
from imagepipeline.models import Embedding, Recipe
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.resident import ResidentEmbedder, ResidentIndex, ResidentVision
from imagepipeline.services import embedder, vision
from imagepipeline.services.embedder import Embedder, LocalEmbedder, OpenRouterEmbedder
from imagepipeline.services.notifier import EventWebhook, MailNotifier, Notifier, WebhookNotifier
from imagepipeline.services.vision import (
    DEFAULT_PROMPT,
    LocalVision,
    OpenAIVision,
    VisionModel,
    VisionOptions,
)
from imagepipeline.settings import NO_KEY, Settings
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.limiter import CallLimiter
from imagepipeline.tenants import Tenants

if TYPE_CHECKING:
    from imagepipeline.imaging.variants import Renderer
    from imagepipeline.services.batch_api import BatchApi


def build_vision(settings: Settings) -> VisionModel:
    """The vision model. An offline one runs in the resident if there is one, or else here."""
    if not settings.has_remote_vision:
        resident = settings.resident_socket
        return ResidentVision(str(resident)) if resident else LocalVision()
    key = settings.openai_api_key.get_secret_value() if settings.openai_api_key else NO_KEY
    prompt = settings.vision_prompt or DEFAULT_PROMPT
    return OpenAIVision(
        key, settings.openai_base_url, settings.vision_model, prompt, build_vision_options(settings)
    )


def build_batch_api(settings: Settings) -> "BatchApi":
    """The Batch API of the provider of the vision model."""
    from imagepipeline.services.batch_api import BatchApi

    key = settings.openai_api_key.get_secret_value() if settings.openai_api_key else NO_KEY
    return BatchApi("the vision model", key, settings.openai_base_url)


def build_vision_options(settings: Settings) -> VisionOptions:
    """Returns the options of a remote vision model."""
    return VisionOptions(
        settings.vision_long_side_px,
        settings.vision_detail,
        settings.answer_format,
        settings.vision_tags,
        settings.vision_categories,
        settings.languages,
    )


def build_embedder(settings: Settings) -> Embedder:
    """The embedder of images and queries. An offline one runs as `build_vision` says."""
    if not settings.has_remote_embedder:
        resident = settings.resident_socket
        return ResidentEmbedder(str(resident)) if resident else LocalEmbedder()
    key = settings.openrouter_api_key.get_secret_value() if settings.openrouter_api_key else NO_KEY
    return OpenRouterEmbedder(key, settings.openrouter_base_url, settings.embedding_model)


def build_index(settings: Settings) -> EmbeddingStore:
    """The embedding index, through the resident if there is one: it writes for all runs here."""
    resident = settings.resident_socket
    return ResidentIndex(str(resident)) if resident else open_index(settings.index_uri)


def build_notifiers(settings: Settings) -> list[Notifier]:
    """Returns the configured notifiers; they connect when they send a message."""
    notifiers: list[Notifier] = []
    if settings.webhook_url and settings.webhook_secret:
        url, secret = (
            settings.webhook_url.get_secret_value(),
            settings.webhook_secret.get_secret_value(),
        )
        notifiers.append(WebhookNotifier(url, secret, settings.webhook_allow_private))
    if settings.smtp_url:
        recipients = [address.strip() for address in settings.mail_to.split(",")]
        notifiers.append(
            MailNotifier(settings.smtp_url.get_secret_value(), settings.mail_from, recipients)
        )
    return notifiers


def build_event_webhook(settings: Settings) -> EventWebhook | None:
    """The app's webhook; None if none is set."""
    if not (settings.event_webhook_url and settings.webhook_secret):
        return None
    return EventWebhook(
        settings.event_webhook_url.get_secret_value(),
        settings.webhook_secret.get_secret_value(),
        settings.webhook_allow_private,
    )


@contextmanager
def open_limiter(settings: Settings) -> Iterator[CallLimiter]:
    """Opens the rate limiter, which connects when it is first used."""
    with closing(
        CallLimiter(settings.redis_url, settings.queue_prefix, settings.rate_limit)
    ) as limiter:
        yield limiter


@contextmanager
def open_paid_calls(settings: Settings) -> Iterator[PaidCalls]:
    """The maker of paid calls, with the pipeline's own limits and budgets."""
    ledger, catalogue = Ledger(settings.database_url), Catalogue(settings.database_url)
    tenants = build_tenants(settings)
    with open_limiter(settings) as limiter:
        budgets = (settings.daily_budget_usd, settings.monthly_budget_usd)
        recipes = {
            "metadata": build_vision_recipe(settings),
            "embedding": build_embedding_recipe(settings),
        }
        yield PaidCalls(
            ledger,
            limiter,
            settings.all_prices,
            *budgets,
            recipes=recipes,
            tenants=tenants,
            has_uploads=lambda: catalogue.has_uploads(tenants.find_spent()),
        )


def build_tenants(settings: Settings) -> Tenants:
    """What tenants may use."""
    url = settings.database_url
    shares = (settings.tenant_max_runs, settings.tenant_daily_budgets_usd)
    return Tenants(Catalogue(url), Ledger(url), *shares)


def build_vision_recipe(settings: Settings) -> Recipe:
    """Returns the recipe for descriptions under these settings."""
    if not settings.has_remote_vision:
        return vision.LOCAL_RECIPE
    prompt = settings.vision_prompt or DEFAULT_PROMPT
    return vision.openai_recipe(settings.vision_model, prompt, build_vision_options(settings))


def build_embedding_recipe(settings: Settings) -> Recipe:
    """Returns the recipe for embeddings under these settings."""
    if not settings.has_remote_embedder:
        return embedder.LOCAL_RECIPE
    return embedder.openrouter_recipe(settings.embedding_model)


def build_recipes(settings: Settings) -> dict[str, Recipe]:
    """Returns the recipe of each asset under these settings.

    When a recipe changes, Dagster marks the results of its asset as outdated.
    """
    from imagepipeline.imaging.variants import build_recipe  # imported here, as it imports Pillow

    return {
        "metadata": build_vision_recipe(settings),
        "variants": build_recipe(
            settings.specs, settings.animation == "keep", settings.keep_copyright
        ),
        "embedding": build_embedding_recipe(settings),
    }


def build_renderer(settings: Settings) -> "Renderer":
    """The maker of variants under these settings."""
    from imagepipeline.imaging.variants import Renderer

    return Renderer(
        settings.specs,
        settings.animation == "keep",
        settings.keep_copyright,
        settings.compared_share,
    )


def embed_query(settings: Settings, text: str, report: Callable[[str], None]) -> Embedding:
    """Embeds the text of a search; calls of a remote model are limited and recorded as usual."""
    model = build_embedder(settings)
    with open_paid_calls(settings) as paid_calls:
        return paid_calls.make(None, "search", model.recipe, lambda: model.embed(text), report)[0]
