"""The pipeline on one screen: everything Dagster is told of, and the settings it is made with."""

from dataclasses import asdict
from typing import Any

import dagster as dg

from imagepipeline.defs import assets, jobs, notifications, reconciler, resources, sensors
from imagepipeline.imaging.variants import build_recipe
from imagepipeline.models import Recipe, build_variant_specs
from imagepipeline.providers import build_vision_options
from imagepipeline.services import embedder, vision
from imagepipeline.settings import NO_KEY, Settings


@dg.definitions
def defs() -> dg.Definitions:
    """The code location. Nothing connects and nothing is read from a disk here."""
    settings = Settings.load()
    recipes = build_recipes(settings)
    return dg.Definitions(
        assets=[
            asset.map_asset_specs(
                lambda spec: spec.replace_attributes(code_version=recipes[spec.key.to_user_string()].version)
            )
            for asset in (assets.metadata, assets.variants, assets.embedding)
        ],
        jobs=[jobs.process_upload],
        sensors=[sensors.upload_sensor, reconciler.reconciler, notifications.notification_sensor],
        resources=build_resources(settings),
        executor=dg.in_process_executor,
    )


def build_recipes(settings: Settings) -> dict[str, Recipe]:
    """What will make each asset under these settings; a change of it marks the asset's results as outdated."""
    return {
        "metadata": (
            vision.openai_recipe(
                settings.vision_model,
                settings.vision_prompt or vision.DEFAULT_PROMPT,
                build_vision_options(settings),
            )
            if settings.has_remote_vision
            else vision.LOCAL_RECIPE
        ),
        "variants": build_recipe(
            build_variant_specs(settings.webp_quality, settings.avif_quality),
            settings.animation == "keep",
            settings.keep_copyright,
        ),
        "embedding": (
            embedder.openrouter_recipe(settings.embedding_model)
            if settings.has_remote_embedder
            else embedder.LOCAL_RECIPE
        ),
    }


def build_resources(settings: Settings) -> dict[str, Any]:
    """The resources; a secret is named by its variable, never given."""
    files = resources.StorageResource(root=settings.storage)
    sandbox = resources.SandboxResource(memory_bytes=settings.max_memory_bytes, cpu_seconds=settings.max_cpu_seconds)
    redis_url = dg.EnvVar("REDIS_URL") if settings.explicit_redis_url else settings.redis_url
    database_url = dg.EnvVar("DATABASE_URL") if settings.explicit_database_url else settings.database_url
    ledger = resources.LedgerResource(url=database_url)
    resident = str(settings.resident_socket) if settings.resident_socket else None
    return {
        "queue": resources.UploadQueueResource(url=redis_url, prefix=settings.queue_prefix),
        "catalogue": resources.CatalogueResource(url=database_url),
        "ledger": ledger,
        "paid_calls": resources.PaidCallsResource(
            ledger=ledger,
            redis_url=redis_url,
            prefix=settings.queue_prefix,
            rate_limit=settings.rate_limit,
            prices={model: list(prices) for model, prices in settings.prices.items()},
            daily_budget_usd=settings.daily_budget_usd,
            monthly_budget_usd=settings.monthly_budget_usd,
        ),
        "notifiers": resources.NotifiersResource(
            webhook_url=dg.EnvVar("IMAGEPIPELINE_WEBHOOK_URL") if settings.webhook_url else None,
            webhook_secret=dg.EnvVar("IMAGEPIPELINE_WEBHOOK_SECRET") if settings.webhook_secret else None,
            webhook_allow_private=settings.webhook_allow_private,
            smtp_url=dg.EnvVar("IMAGEPIPELINE_SMTP_URL") if settings.smtp_url else None,
            mail_from=settings.mail_from,
            mail_to=settings.mail_to,
        ),
        "files": files,
        "originals": resources.OriginalsResource(
            files=files,
            sandbox=sandbox,
            rules={
                "max_bytes": settings.max_bytes,
                "max_pixels": settings.max_pixels,
                "max_side_px": settings.max_side_px,
                "max_frames": settings.max_frames,
                "max_icc_bytes": settings.max_icc_bytes,
                "max_text_bytes": settings.max_text_bytes,
                "is_animation_kept": settings.animation == "keep",
                "is_truncated_accepted": settings.accept_truncated,
            },
            preview_px=settings.vision_long_side_px,
        ),
        "renderer": resources.RendererResource(
            webp_quality=settings.webp_quality,
            avif_quality=settings.avif_quality,
            is_animated=settings.animation == "keep",
            has_rights=settings.keep_copyright,
        ),
        "index": resources.EmbeddingIndexResource(uri=settings.index_uri, resident=resident),
        "vision": (
            resources.OpenAIVisionResource(
                api_key=dg.EnvVar("OPENAI_API_KEY") if settings.openai_api_key else NO_KEY,
                base_url=settings.openai_base_url,
                model=settings.vision_model,
                prompt=settings.vision_prompt or vision.DEFAULT_PROMPT,
                options=asdict(build_vision_options(settings)),
            )
            if settings.has_remote_vision
            else resources.LocalVisionResource(resident=resident)
        ),
        "embedder": (
            resources.OpenRouterEmbedderResource(
                api_key=dg.EnvVar("OPENROUTER_API_KEY") if settings.openrouter_api_key else NO_KEY,
                base_url=settings.openrouter_base_url,
                model=settings.embedding_model,
            )
            if settings.has_remote_embedder
            else resources.LocalEmbedderResource(resident=resident)
        ),
    }
