"""Fixtures: an ephemeral Dagster instance, and the resources as plain objects."""

import uuid
from contextlib import closing

import dagster as dg
import pytest

from imagepipeline import models
from imagepipeline.defs import assets as pipeline
from imagepipeline.defs.attempts import ANEW_TAG, GENERATION_TAG
from imagepipeline.defs.jobs import process_upload
from imagepipeline.imaging.decoding import Rules
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.imaging.variants import Renderer
from imagepipeline.models import build_variant_specs
from imagepipeline.originals import Originals
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.planning import Applier
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.services.vision import LocalVision
from imagepipeline.stores.applies import Applies
from imagepipeline.stores.batches import Batches
from imagepipeline.stores.broker import TaskQueue
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.limiter import CallLimiter
from imagepipeline.stores.plans import Plans
from imagepipeline.tenants import Tenants
from imagepipeline_tests.conftest import PHOTOS

ASSETS = [getattr(pipeline, name) for name in models.ASSETS]


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def tasks(redis_url):
    """The queue of the workers, on a real Redis."""
    with closing(TaskQueue(redis_url, "test")) as tasks:
        yield tasks


@pytest.fixture
def ledger(sqlite_catalogue_url, catalogue):
    with closing(Ledger(sqlite_catalogue_url)) as ledger:
        yield ledger


@pytest.fixture
def tenants(catalogue, ledger):
    """Tenants without limits of their own."""
    return Tenants(catalogue, ledger, {}, {})


@pytest.fixture
def limiter(redis_url):
    with closing(CallLimiter(redis_url, "test", "off")) as limiter:
        yield limiter
        limiter.set_limits(None)


@pytest.fixture
def paid_calls(ledger, limiter):
    return PaidCalls(ledger, limiter, {"scripted": (1.0, 10.0)})


RECIPES = {
    "metadata": LocalVision.recipe,
    "variants": Renderer(build_variant_specs()).recipe,
    "embedding": LocalEmbedder.recipe,
}


@pytest.fixture
def applier(sqlite_catalogue_url, catalogue, ledger):
    """Carries out applies, by the recipes of the offline models."""
    applies, plans = Applies(sqlite_catalogue_url), Plans(sqlite_catalogue_url)
    return Applier(applies, plans, catalogue, ledger, Batches(sqlite_catalogue_url), RECIPES)


@pytest.fixture
def run(instance, catalogue, files, index, paid_calls):
    """A function that runs assets of one image, manually or, with a generation, like the sensor."""

    def run(image_id, generation=None, assets=ASSETS, anew=None, tags=None, **resources):
        instance.add_dynamic_partitions("uploads", [image_id])
        return dg.materialize(
            ASSETS,
            selection=dg.AssetSelection.assets(*assets),
            partition_key=image_id,
            instance=instance,
            tags=({} if generation is None else {GENERATION_TAG: str(generation)})
            | ({ANEW_TAG: anew} if anew else {})
            | (tags or {}),
            resources={
                "catalogue": catalogue,
                "files": files,
                "originals": Originals(files, Sandbox(), Rules()),
                "renderer": Renderer(build_variant_specs()),
                "index": index,
                "paid_calls": paid_calls,
                "vision": LocalVision(),
                "embedder": LocalEmbedder(),
                **resources,
            },
            raise_on_error=False,
        )

    return run


@pytest.fixture
def cat(files):
    """The ID of an image whose original is stored."""
    files.put_original("cat", (PHOTOS / "cat.jpg").read_bytes(), "jpg")
    return "cat"


@pytest.fixture
def start_run(instance):
    """A function that records a run of the upload job without executing it."""

    def start_run(image_id, generation=1, status=dg.DagsterRunStatus.STARTED, **attributes):
        run = dg.DagsterRun(
            job_name=process_upload.name,
            run_id=str(uuid.uuid4()),
            status=status,
            **attributes,
            tags={"dagster/partition": image_id, GENERATION_TAG: str(generation)},
        )
        return instance.add_run(run)

    return start_run
