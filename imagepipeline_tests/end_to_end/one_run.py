"""Executes one run of the image `cat`, for tests that kill it.

    python -m imagepipeline_tests.end_to_end.one_run FOLDER GENERATION [EFFECT before|after SIGNAL]

DATABASE_URL names the catalogue. With PAID_CALLS_REDIS_URL, the models count as paid ones.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg

from imagepipeline.defs.assets import embedding, metadata, variants
from imagepipeline.defs.attempts import GENERATION_TAG
from imagepipeline.imaging.decoding import Rules
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.imaging.variants import Renderer
from imagepipeline.models import Embedding, Recipe, build_variant_specs
from imagepipeline.originals import Originals
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.services.vision import LocalVision
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.files import FileStore
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.limiter import CallLimiter
from imagepipeline.stores.vectors import EmbeddingIndex
from imagepipeline_tests.end_to_end.test_crashes import EFFECTS


def signal_at(effect: str, moment: str, name: str) -> None:
    """Makes the process send itself a signal before or after the first call of an effect."""
    owner, method = EFFECTS[effect]
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


def main() -> None:
    """Executes the run; the exit code is 0 if it succeeds."""
    folder, generation = Path(sys.argv[1]), sys.argv[2]
    if len(sys.argv) > 3:
        signal_at(*sys.argv[3:])
    redis_url = os.environ.get("PAID_CALLS_REDIS_URL")
    with dg.DagsterInstance.from_config(str(folder)) as instance:
        instance.add_dynamic_partitions("uploads", ["cat"])
        result = dg.materialize(
            [metadata, variants, embedding],
            partition_key="cat",
            instance=instance,
            tags={GENERATION_TAG: generation},
            resources={
                "catalogue": Catalogue(os.environ["DATABASE_URL"]),
                "files": (files := FileStore(folder / "storage")),
                "originals": Originals(files, Sandbox(), Rules()),
                "renderer": Renderer(build_variant_specs()),
                "index": EmbeddingIndex(str(folder / "lancedb")),
                "paid_calls": PaidCalls(
                    Ledger(os.environ["DATABASE_URL"]),
                    CallLimiter(redis_url or "redis://", "x", "off"),
                    {},
                ),
                "vision": PaidVision() if redis_url else LocalVision(),
                "embedder": PaidEmbedder() if redis_url else LocalEmbedder(),
            },
            raise_on_error=False,
        )
    sys.exit(int(not result.success))


if __name__ == "__main__":
    main()
