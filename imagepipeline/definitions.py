"""The pipeline on one screen: all Dagster definitions and the resources behind them."""

import dagster as dg

from imagepipeline.defs import (
    assets,
    backlog,
    batches,
    checks,
    events,
    index,
    jobs,
    notifications,
    outcomes,
    reconciler,
    resources,
    retention,
    sensors,
)
from imagepipeline.homes import secure_home
from imagepipeline.originals import build_originals
from imagepipeline.planning import build_applier
from imagepipeline.providers import (
    build_embedder,
    build_event_webhook,
    build_index,
    build_notifiers,
    build_recipes,
    build_renderer,
    build_tenants,
    build_vision,
    open_paid_calls,
)
from imagepipeline.settings import Settings
from imagepipeline.storage import open_storage
from imagepipeline.stores.broker import TaskQueue
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.events import EventLog
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.outbox import Outbox
from imagepipeline.stores.plans import Plans
from imagepipeline.stores.retention import Retention
from imagepipeline.stores.stream import EventStream
from imagepipeline.stores.uploads import UploadQueue

NICEST = 19  # the lowest priority for the CPU, see setpriority(2)


@dg.definitions
def defs() -> dg.Definitions:
    """Returns the definitions of the code location.

    Opens no connections, and reads and changes nothing on disk but the permissions of the home.
    """
    settings = Settings.load()
    secure_home(settings)  # here, because `dagster dev` runs none of our other startup code
    recipes = build_recipes(settings)
    return dg.Definitions(
        assets=[
            asset.map_asset_specs(
                lambda spec: spec.replace_attributes(
                    code_version=recipes[spec.key.to_user_string()].version
                )
            )
            for asset in (assets.metadata, assets.variants, assets.embedding)
        ]
        + [backlog.queue_spec, outcomes.original_spec, index.index_spec, index.outdated_spec],
        jobs=[jobs.process_upload, batches.process_batch, batches.apply_plan],
        asset_checks=[checks.variant_checks, backlog.queue_checks],
        sensors=[
            sensors.upload_sensor,
            reconciler.reconciler,
            notifications.notification_sensor,
            checks.check_sensor,
            events.event_sensor,
            *([events.event_webhook_sensor] if settings.event_webhook_url else []),
            backlog.queue_sensor,
            index.index_sensor,
            retention.prune_sensor,
        ],
        resources=build_resources(settings),
        executor=dg.in_process_executor,
    )


def build_resources(settings: Settings) -> dict[str, dg.ResourceDefinition]:
    """Returns the resources of assets and sensors; each connects when it is first used."""
    files = open_storage(settings.storage)
    queue, broker, prefix = settings.redis_url, settings.broker_url, settings.queue_prefix
    database = settings.database_url
    return {
        "queue": resources.opened(
            lambda: UploadQueue(queue, prefix), "The Redis lists on which uploads arrive."
        ),
        "tasks": resources.opened(
            lambda: TaskQueue(broker, prefix), "The queue of runs that wait for a worker."
        ),
        "catalogue": resources.made(lambda: Catalogue(database), "The SQL record of all images."),
        "ledger": resources.made(lambda: Ledger(database), "What paid calls cost, and the pauses."),
        "plans": resources.made(
            lambda: Plans(database, is_patient=False), "Finds what images need."
        ),
        "recipes": resources.made(
            lambda: build_recipes(settings), "What would make each asset today."
        ),
        "outbox": resources.made(
            lambda: Outbox(database), "Notices of final failures for the administrators."
        ),
        "paid_calls": resources.entered(
            lambda: open_paid_calls(settings),
            "Makes paid calls within rate limit and budget, and records them.",
        ),
        "notifiers": resources.made(
            lambda: build_notifiers(settings),
            "The channels that notify administrators: webhook, mail, both or none.",
        ),
        "event_log": resources.made(lambda: EventLog(database), "What apps are told of images."),
        "event_stream": resources.opened(
            lambda: EventStream(queue, prefix, settings.event_stream_length),
            "The Redis stream on which apps get events.",
        ),
        "event_webhook": resources.made(
            lambda: build_event_webhook(settings), "The webhook that gets events, or none."
        ),
        "files": resources.made(lambda: files, "The files of originals and variants."),
        "originals": resources.opened(
            lambda: build_originals(settings, files),
            "The originals, each decoded once per run, and the rules for accepting them.",
        ),
        "background_originals": resources.opened(
            lambda: build_originals(settings, files, NICEST),
            "Originals for the bulk lane, whose decoders yield the CPU to those of uploads.",
        ),
        "batch_size": resources.made(
            lambda: settings.batch_size, "How many images a run of the bulk lane takes."
        ),
        "tenants": resources.made(
            lambda: build_tenants(settings), "What tenants may use, and have used."
        ),
        "applier": resources.made(
            lambda: build_applier(settings), "Begins the images of `imagepipeline apply`."
        ),
        "index_uri": resources.made(lambda: settings.index_uri, "Where the index is."),
        "pruner": resources.made(lambda: build_pruner(settings), "Forgets what is old."),
        "renderer": resources.made(lambda: build_renderer(settings), "How variants are made."),
        "index": resources.made(lambda: build_index(settings), "The embeddings, in LanceDB."),
        "vision": resources.made(
            lambda: build_vision(settings), "The model that describes images."
        ),
        "embedder": resources.made(
            lambda: build_embedder(settings), "The model that embeds texts."
        ),
    }


def build_pruner(settings: Settings) -> retention.Pruner:
    """Returns what forgets what is old, by the settings."""
    kept = retention.Kept(
        settings.keep_runs_days,
        settings.keep_partitions,
        settings.keep_partitions_days,
        settings.keep_calls_days,
        settings.keep_notices_days,
        [notifier.channel for notifier in build_notifiers(settings)],
    )
    return retention.Pruner(Retention(settings.database_url), kept)
