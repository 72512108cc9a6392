"""The resident: one process that keeps what costs seconds to import or load, for all runs.

It is the one writer of the index, and holds the offline models. Runs reach it on a Unix socket whose folder only its
owner may enter; what passes there is pickled. Without it (under `dagster dev`, in tests) a run loads all this itself.
"""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from imagepipeline.errors import ResidentDownError
from imagepipeline.models import Claim, Embedding, PixelFacts, Recipe, VisionAnswer
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.services.vision import LocalVision
from imagepipeline.stores.vectors import BatchingIndex

BACKLOG = 64  # connections that may wait to be accepted


def serve(address: str, index_uri: str) -> None:
    """Answers calls until the process that started this one ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    index, vision, embedder = BatchingIndex(index_uri), LocalVision(), LocalEmbedder()
    functions: dict[str, Callable[..., Any]] = {
        "upsert": index.upsert,
        "get": index.get,
        "describe": vision.describe,
        "embed": embedder.embed,
    }
    Path(address).unlink(missing_ok=True)  # of one that was killed
    threading.Thread(target=index.count_rows, daemon=True).start()  # so that the first upload finds LanceDB imported
    with Listener(address, "AF_UNIX", BACKLOG) as listener:
        while True:
            connection = listener.accept()
            threading.Thread(target=_answer, args=(connection, functions), daemon=True).start()


class Resident:
    """The resident at `address`, as a run sees it; each call is a connection of its own."""

    def __init__(self, address: str) -> None:
        self._address = address

    def call(self, name: str, *arguments: Any) -> Any:
        """What that function of the resident gives, or raises.

        Raises:
            ResidentDownError: it is not there, or died while it worked; the call may or may not have been carried out.
        """
        try:
            with Client(self._address, "AF_UNIX") as connection:
                connection.send((name, arguments))
                value, error = connection.recv()
        except (OSError, EOFError) as problem:
            raise ResidentDownError(
                f"the process that keeps index and models does not answer ({type(problem).__name__}): "
                "the code server starts it again, its log says why it ended"
            ) from None
        if error is not None:
            raise error
        return value


class ResidentIndex(Resident):
    """The index, as `EmbeddingIndex`; upserts that arrive together share a commit."""

    def upsert(self, claim: Claim, embedding: Embedding) -> None:
        """As `EmbeddingIndex.upsert`."""
        self.call("upsert", claim, embedding)

    def get(self, image_id: str, version: str) -> dict[str, Any] | None:
        """As `EmbeddingIndex.get`."""
        row: dict[str, Any] | None = self.call("get", image_id, version)
        return row


class ResidentVision(Resident):
    """The offline vision model, as `LocalVision`."""

    recipe: Recipe = LocalVision.recipe

    def describe(self, preview: bytes, facts: PixelFacts) -> VisionAnswer:
        """As `LocalVision.describe`."""
        answer: VisionAnswer = self.call("describe", preview, facts)
        return answer


class ResidentEmbedder(Resident):
    """The offline embedder, as `LocalEmbedder`."""

    recipe: Recipe = LocalEmbedder.recipe

    def embed(self, text: str) -> Embedding:
        """As `LocalEmbedder.embed`."""
        embedding: Embedding = self.call("embed", text)
        return embedding


def _answer(connection: Connection, functions: dict[str, Callable[..., Any]]) -> None:
    with connection, contextlib.suppress(OSError, EOFError):  # a run that was killed meanwhile
        name, arguments = connection.recv()
        value, failure = None, None
        try:
            value = functions[name](*arguments)
        except Exception as error:
            failure = error
        connection.send((value, failure))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)
