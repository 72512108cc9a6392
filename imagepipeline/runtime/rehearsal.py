"""A rehearsed upload: the preload does one, so that no run need make what libraries make when they are first used.

Dagster compiles the constructors of its records, SQLAlchemy its statements, pydantic its models. The upload goes
through the real assets, catalogue, storage and sandbox in a folder of its own; only the models are stand-ins.
"""

import io
import json
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from PIL import Image

from imagepipeline.defs import assets, jobs
from imagepipeline.defs.failures import GENERATION_TAG
from imagepipeline.defs.originals import Originals
from imagepipeline.imaging.decoding import Rules
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.imaging.variants import Renderer
from imagepipeline.models import Claim, Embedding, PixelFacts, Recipe, Upload, VisionAnswer, build_variant_specs
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.runtime.sqlite_storage import close_connections
from imagepipeline.services import openai_client
from imagepipeline.services.answers import read_answer
from imagepipeline.services.vision import VisionOptions
from imagepipeline.stores import tables
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.database import Database
from imagepipeline.stores.files import FileStore
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.limiter import CallLimiter

IMAGE_ID = "rehearsal"
ANSWER = {"description": "A rehearsal.", "tags": ["rehearsals"], "category": "x", "dominantColors": [], "mood": "calm"}
HEARTBEAT_SECONDS = 5  # it ends with the run


class StandIn:
    """All of the models and the index that an upload needs; they answer at once."""

    recipe = Recipe("local", "stand-in")

    def describe(self, preview: bytes, facts: PixelFacts) -> VisionAnswer:
        """As a vision model."""
        return VisionAnswer(read_answer(json.dumps(ANSWER), VisionOptions()))

    def embed(self, text: str) -> Embedding:
        """As an embedder."""
        return Embedding(text, (1.0,), self.recipe.version)

    def get(self, image_id: str, version: str) -> None:
        """As an index that has nothing."""

    def upsert(self, claim: Claim, embedding: Embedding) -> None:
        """As an index that keeps nothing."""


def rehearse() -> None:
    """Does one upload; leaves no thread, connection, file or signal handler behind.

    Raises:
        RuntimeError: it failed, which no upload would then do better.
    """
    openai_client.rehearse()
    with _signals_kept(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "dagster.yaml").write_text(yaml.safe_dump(_build_instance_config(folder)))
        with dg.DagsterInstance.from_config(name) as instance:
            result = _process(folder, instance)
        close_connections()
        if not result.success:
            raise RuntimeError("the rehearsed upload failed: see the lines above")
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(HEARTBEAT_SECONDS)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Makes stops wait, which Dagster would take for its run's, and puts back their handlers, which it changes."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _build_instance_config(folder: Path) -> dict[str, Any]:
    storage = {
        "module": "imagepipeline.runtime.sqlite_storage",
        "class": "PooledSqliteStorage",
        "config": {"base_dir": str(folder / "dagster")},
    }
    no_logs = {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}
    quiet = {"python_log_level": "ERROR"}
    return {
        "storage": {"custom": storage},
        "compute_logs": no_logs,
        "python_logs": quiet,
        "telemetry": {"enabled": False},
    }


def _process(folder: Path, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "JPEG")
    files = FileStore(folder / "storage")
    files.put_original(IMAGE_ID, picture.getvalue(), "jpg")
    database = f"sqlite:///{folder / 'catalogue.sqlite'}"
    tables.schema.create_all(Database(database).engine)
    catalogue, stand_in = Catalogue(database), StandIn()
    catalogue.accept([Upload(IMAGE_ID)])
    originals = Originals(files, Sandbox(), Rules())
    definitions = dg.Definitions(
        assets=[assets.metadata, assets.variants, assets.embedding],
        jobs=[jobs.process_upload],
        resources={
            "catalogue": catalogue,
            "files": files,
            "originals": originals,
            "renderer": Renderer(build_variant_specs()),
            "vision": stand_in,
            "embedder": stand_in,
            "index": stand_in,
            "paid_calls": PaidCalls(Ledger(database), CallLimiter("redis://", "rehearsal", "off"), {}),
        },
        executor=dg.in_process_executor,
    )
    instance.add_dynamic_partitions("uploads", [IMAGE_ID])
    try:
        return definitions.resolve_job_def(jobs.process_upload.name).execute_in_process(
            instance=instance, partition_key=IMAGE_ID, tags={GENERATION_TAG: "1"}, raise_on_error=False
        )
    finally:
        originals.close()
        catalogue.close()
