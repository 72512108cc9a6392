"""What the assets and the sensor are given: each resource is a recipe for a plain object of `stores` or `services`.

Secrets arrive as `dg.EnvVar`, so that no value of theirs is shown in the UI or stored by Dagster.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import dagster as dg

from imagepipeline.defs.originals import Originals
from imagepipeline.imaging.decoding import Rules
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.imaging.variants import Renderer
from imagepipeline.models import build_variant_specs
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.resident import ResidentEmbedder, ResidentIndex, ResidentVision
from imagepipeline.services.embedder import LocalEmbedder, OpenRouterEmbedder
from imagepipeline.services.notifier import MailNotifier, Notifier, WebhookNotifier
from imagepipeline.services.vision import LocalVision, OpenAIVision, VisionOptions
from imagepipeline.storage import Storage, open_storage
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.limiter import CallLimiter
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline.stores.vectors import EmbeddingIndex


class UploadQueueResource(dg.ConfigurableResource[UploadQueue]):
    """The Redis lists uploads arrive on."""

    url: str
    prefix: str

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[UploadQueue]:
        """The queue; it connects when first used, and is closed with the run or tick."""
        with closing(UploadQueue(self.url, self.prefix)) as queue:
            yield queue


class CatalogueResource(dg.ConfigurableResource[Catalogue]):
    """The SQL record of all images."""

    url: str

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[Catalogue]:
        """The catalogue; it connects when first used, and is closed with the run or tick."""
        with closing(Catalogue(self.url)) as catalogue:
            yield catalogue


class LedgerResource(dg.ConfigurableResource[Ledger]):
    """What paid calls cost, and the pauses."""

    url: str

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[Ledger]:
        """The ledger; it connects when first used, and is closed with the run or tick."""
        with closing(Ledger(self.url)) as ledger:
            yield ledger


class PaidCallsResource(dg.ConfigurableResource[PaidCalls]):
    """Who makes the paid calls: within rate limit and budget, and written down."""

    ledger: dg.ResourceDependency[Ledger]
    redis_url: str
    prefix: str
    rate_limit: str
    prices: dict[str, list[float]]
    daily_budget_usd: float | None = None
    monthly_budget_usd: float | None = None

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[PaidCalls]:
        """The maker of calls; it connects to Redis at the first paid one."""
        prices = {model: (price[0], price[1]) for model, price in self.prices.items()}
        with closing(CallLimiter(self.redis_url, self.prefix, self.rate_limit)) as limiter:
            yield PaidCalls(self.ledger, limiter, prices, self.daily_budget_usd, self.monthly_budget_usd)


class StorageResource(dg.ConfigurableResource[Storage]):
    """Originals and variants."""

    root: str

    def create_resource(self, context: dg.InitResourceContext) -> Storage:
        """The store below the root."""
        return open_storage(self.root)


class SandboxResource(dg.ConfigurableResource[Sandbox]):
    """Where images are decoded and encoded."""

    memory_bytes: int
    cpu_seconds: int

    def create_resource(self, context: dg.InitResourceContext) -> Sandbox:
        """The sandbox; each original in it has a process of its own."""
        return Sandbox(self.memory_bytes, self.cpu_seconds)


class OriginalsResource(dg.ConfigurableResource[Originals]):
    """The originals, and the rules for what they may be."""

    files: dg.ResourceDependency[Storage]
    sandbox: dg.ResourceDependency[Sandbox]
    rules: dict[str, Any]
    preview_px: int

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[Originals]:
        """The originals; each run decodes its own once, and ends its sandbox."""
        with closing(Originals(self.files, self.sandbox, Rules(**self.rules), self.preview_px)) as originals:
            yield originals


class RendererResource(dg.ConfigurableResource[Renderer]):
    """How variants are made."""

    webp_quality: int
    avif_quality: int
    is_animated: bool
    has_rights: bool

    def create_resource(self, context: dg.InitResourceContext) -> Renderer:
        """The renderer."""
        specs = build_variant_specs(self.webp_quality, self.avif_quality)
        return Renderer(specs, self.is_animated, self.has_rights)


class EmbeddingIndexResource(dg.ConfigurableResource[EmbeddingIndex | ResidentIndex]):
    """The embeddings, in LanceDB; through the resident if there is one."""

    uri: str
    resident: str | None = None

    def create_resource(self, context: dg.InitResourceContext) -> EmbeddingIndex | ResidentIndex:
        """The index; it connects when first used."""
        return ResidentIndex(self.resident) if self.resident else EmbeddingIndex(self.uri)


class OpenAIVisionResource(dg.ConfigurableResource[OpenAIVision]):
    """A remote vision model."""

    api_key: str
    base_url: str
    model: str
    prompt: str
    options: dict[str, Any]

    def create_resource(self, context: dg.InitResourceContext) -> OpenAIVision:
        """The model; it connects when first asked."""
        return OpenAIVision(self.api_key, self.base_url, self.model, self.prompt, VisionOptions(**self.options))


class LocalVisionResource(dg.ConfigurableResource[LocalVision | ResidentVision]):
    """The vision model that needs no key and no network; in the resident if there is one."""

    resident: str | None = None

    def create_resource(self, context: dg.InitResourceContext) -> LocalVision | ResidentVision:
        """The model; its weights are read when first asked."""
        return ResidentVision(self.resident) if self.resident else LocalVision()


class OpenRouterEmbedderResource(dg.ConfigurableResource[OpenRouterEmbedder]):
    """A remote embedding model."""

    api_key: str
    base_url: str
    model: str

    def create_resource(self, context: dg.InitResourceContext) -> OpenRouterEmbedder:
        """The embedder; it connects when first asked."""
        return OpenRouterEmbedder(self.api_key, self.base_url, self.model)


class LocalEmbedderResource(dg.ConfigurableResource[LocalEmbedder | ResidentEmbedder]):
    """The embedding model that needs no key and no network; in the resident if there is one."""

    resident: str | None = None

    def create_resource(self, context: dg.InitResourceContext) -> LocalEmbedder | ResidentEmbedder:
        """The embedder; its weights are read when first asked."""
        return ResidentEmbedder(self.resident) if self.resident else LocalEmbedder()


class NotifiersResource(dg.ConfigurableResource[list[Notifier]]):
    """How the administrators are told: by webhook, by mail, by both, or not at all."""

    webhook_url: str | None = None
    webhook_secret: str | None = None
    webhook_allow_private: bool = False
    smtp_url: str | None = None
    mail_from: str = ""
    mail_to: str = ""

    def create_resource(self, context: dg.InitResourceContext) -> list[Notifier]:
        """The configured ways; they connect when there is something to tell."""
        notifiers: list[Notifier] = []
        if self.webhook_url:
            secret = self.webhook_secret or ""
            notifiers.append(WebhookNotifier(self.webhook_url, secret, self.webhook_allow_private))
        if self.smtp_url:
            recipients = [address.strip() for address in self.mail_to.split(",")]
            notifiers.append(MailNotifier(self.smtp_url, self.mail_from, recipients))
        return notifiers
