"""The models and the paid calls as the settings say, for commands; the pipeline's own come as Dagster resources."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from imagepipeline.models import Embedding
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.services.embedder import Embedder, LocalEmbedder, OpenRouterEmbedder
from imagepipeline.services.vision import DEFAULT_PROMPT, LocalVision, OpenAIVision, VisionModel, VisionOptions
from imagepipeline.settings import NO_KEY, Settings
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.limiter import CallLimiter


def build_vision(settings: Settings) -> VisionModel:
    """The vision model."""
    if not settings.has_remote_vision:
        return LocalVision()
    key = settings.openai_api_key.get_secret_value() if settings.openai_api_key else NO_KEY
    prompt = settings.vision_prompt or DEFAULT_PROMPT
    return OpenAIVision(key, settings.openai_base_url, settings.vision_model, prompt, build_vision_options(settings))


def build_vision_options(settings: Settings) -> VisionOptions:
    """How a remote vision model is asked."""
    return VisionOptions(
        settings.vision_long_side_px,
        settings.vision_detail,
        settings.answer_format,
        settings.vision_tags,
        settings.vision_categories,
    )


def build_embedder(settings: Settings) -> Embedder:
    """The embedder the pipeline uses, so that queries and images can be compared."""
    if not settings.has_remote_embedder:
        return LocalEmbedder()
    key = settings.openrouter_api_key.get_secret_value() if settings.openrouter_api_key else NO_KEY
    return OpenRouterEmbedder(key, settings.openrouter_base_url, settings.embedding_model)


@contextmanager
def open_limiter(settings: Settings) -> Iterator[CallLimiter]:
    """The rate limit; it connects when first used."""
    with closing(CallLimiter(settings.redis_url, settings.queue_prefix, settings.rate_limit)) as limiter:
        yield limiter


@contextmanager
def open_paid_calls(settings: Settings) -> Iterator[PaidCalls]:
    """The maker of paid calls, with the pipeline's own limits and budgets."""
    with closing(Ledger(settings.database_url)) as ledger, open_limiter(settings) as limiter:
        budgets = (settings.daily_budget_usd, settings.monthly_budget_usd)
        yield PaidCalls(ledger, limiter, settings.prices, *budgets)


def embed_query(settings: Settings, text: str, report: Callable[[str], None]) -> Embedding:
    """A search's text as a vector; a remote model's call is limited, priced and written down like all others."""
    embedder = build_embedder(settings)
    with open_paid_calls(settings) as paid_calls:
        return paid_calls.make(None, "search", embedder.recipe, lambda: embedder.embed(text), report)[0]
