"""Executes one run of the image `cat` in a forked process, for tests that kill it."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg

from imagepipeline.defs.assets import embedding, metadata, variants
from imagepipeline.defs.attempts import GENERATION_TAG
from imagepipeline.imaging.decoding import Rules
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.imaging.variants import Renderer
from imagepipeline.models import Embedding, Recipe, VariantSpec
from imagepipeline.originals import Originals
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.services.vision import LocalVision
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.files import FileStore
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.limiter import CallLimiter
from imagepipeline.stores.vectors import EmbeddingIndex

EFFECTS = {
    "claim": (Catalogue, "claim"),
    "read": (FileStore, "read"),
    "provider call": (LocalVision, "describe"),
    "store the answer": (Catalogue, "save_metadata"),
    "variant rows": (Catalogue, "save_variants"),
    "rename": (FileStore, "write"),
    "embed": (LocalEmbedder, "embed"),
    "index commit": (EmbeddingIndex, "upsert"),
    "result": (Catalogue, "record_result"),
    "final status": (Catalogue, "finish"),
}
REMOVALS = {"removed file": (FileStore, "delete")}  # if the set of variants has changed
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["imagepipeline_tests.end_to_end.preloaded"])


def signal_at(effect: str, moment: str, name: str) -> None:
    """Makes this process send itself a signal before or after the first call of an effect."""
    owner, method = (EFFECTS | REMOVALS)[effect]
    original = getattr(owner, method)
    sent = []

    def send() -> None:
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), getattr(signal, name))

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if moment == "before":
            send()
        result = original(*arguments, **options)
        if moment == "after":
            send()
        return result

    setattr(owner, method, wrapped)


class PaidVision(LocalVision):
    """A local model whose calls are recorded as paid ones."""

    recipe = Recipe("openai", "m")


class PaidEmbedder(LocalEmbedder):
    """Likewise."""

    recipe = Recipe("openrouter", "m")

    def embed(self, text: str) -> Embedding:
        return replace(super().embed(text), version=self.recipe.version)


def execute(
    folder: Path,
    catalogue_url: str,
    generation: int,
    fault: tuple[str, str, str] | None,
    redis_url: str | None,
    specs: Sequence[VariantSpec],
) -> None:
    """Executes a run and ends this process; the exit code is 0 if the run succeeds.

    Args:
        folder: holds files, index and Dagster's home; its `runs.log` gets the output.
        catalogue_url: of the catalogue.
        generation: of the image.
        fault: the arguments of `signal_at`, if the run is to be killed or stopped.
        redis_url: if given, the models count as paid ones.
        specs: the variants to make.
    """
    with open(folder / "runs.log", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if fault:
        signal_at(*fault)
    with dg.DagsterInstance.from_config(str(folder)) as instance:
        instance.add_dynamic_partitions("uploads", ["cat"])
        result = dg.materialize(
            [metadata, variants, embedding],
            partition_key="cat",
            instance=instance,
            tags={GENERATION_TAG: str(generation)},
            resources={
                "catalogue": Catalogue(catalogue_url),
                "files": (files := FileStore(folder / "storage")),
                "originals": Originals(files, Sandbox(), Rules()),
                "renderer": Renderer(specs),
                "index": EmbeddingIndex(str(folder / "lancedb")),
                "paid_calls": PaidCalls(
                    Ledger(catalogue_url), CallLimiter(redis_url or "redis://", "x", "off"), {}
                ),
                "vision": PaidVision() if redis_url else LocalVision(),
                "embedder": PaidEmbedder() if redis_url else LocalEmbedder(),
            },
            raise_on_error=False,
        )
    sys.exit(int(not result.success))
