"""The resident: one process that keeps what costs seconds to import or load, for all runs.

It writes the index for all runs of its machine, and holds the offline models. Runs reach it on a Unix socket whose
folder only its owner may enter; what passes there is JSON of known types (`wire`). Without it (under `dagster dev`, in
tests) a run loads all this itself.
"""

import contextlib
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from imagepipeline.errors import ProviderRejectedError, ResidentDownError, StaleClaimError
from imagepipeline.models import Claim, Embedding, PixelFacts, Recipe, VisionAnswer
from imagepipeline.services.answers import clean_metadata
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.services.vision import LocalVision
from imagepipeline.settings import Settings
from imagepipeline.stores.vectors import BatchingIndex, EmbeddingIndex
from imagepipeline.wire import (
    MalformedMessageError,
    TimedStream,
    describe_error,
    read_message,
    restore_error,
    result_kind,
    validate,
    validate_arguments,
    write_message,
)

BACKLOG = 64  # connections that may wait to be accepted
MAX_BYTES = 20_000_000  # of the picture in a message
QUESTION_SECONDS = 30  # for the whole of a question to arrive
ANSWER_SECONDS = 300  # for a call and its answer: models are loaded first, and a bucket may be slow
ERRORS = (StaleClaimError, ProviderRejectedError, OSError)  # that runs tell apart


def serve(address: str, index_uri: str) -> None:
    """Answers calls until the process ends."""
    index, vision, embedder = BatchingIndex(index_uri), LocalVision(), LocalEmbedder()
    functions: dict[str, Callable[..., Any]] = {
        "upsert": index.upsert,
        "get": index.get,
        "describe": vision.describe,
        "embed": embedder.embed,
    }
    Path(address).unlink(missing_ok=True)  # of one that was killed
    threading.Thread(
        target=index.count_rows, daemon=True
    ).start()  # so that the first upload finds LanceDB imported
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(BACKLOG)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_answer, args=(connection, functions), daemon=True).start()


class Resident:
    """The resident at `address`, as a run sees it; each call is a connection of its own."""

    def __init__(self, address: str) -> None:
        self._address = address

    def call(self, name: str, kind: Any, *arguments: Any) -> Any:
        """What that function of the resident gives, which is of that type, or raises.

        Raises:
            ResidentDownError: it is not there, or died while it worked; the call may or may not have been carried out.
        """
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(QUESTION_SECONDS)
                connection.connect(self._address)
                stream = TimedStream(connection, QUESTION_SECONDS)
                write_message(stream, [name, arguments])
                stream.allow(ANSWER_SECONDS)
                answer = validate(dict[str, Any], read_message(stream, MAX_BYTES))
                if answer.keys() == {"value"}:
                    return validate(kind, answer["value"])
                error = restore_error(answer, ERRORS)
        except (OSError, EOFError, MalformedMessageError) as problem:
            raise ResidentDownError(
                f"the process that keeps index and models does not answer ({type(problem).__name__}): "
                "the code server starts it again, its log says why it ended"
            ) from None
        raise error


class ResidentIndex(Resident):
    """The index in the resident; upserts that arrive together share a commit."""

    def upsert(self, claim: Claim, embedding: Embedding) -> None:
        """See `EmbeddingStore.upsert`."""
        self.call("upsert", None, claim, embedding)

    def get(self, image_id: str, version: str) -> dict[str, Any] | None:
        """See `EmbeddingStore.get`."""
        row: dict[str, Any] | None = self.call(
            "get", result_kind(EmbeddingIndex.get), image_id, version
        )
        return row


class ResidentVision(Resident):
    """The offline vision model, as `LocalVision`. It decodes the picture, so its answer is cleaned here once more."""

    recipe: Recipe = LocalVision.recipe

    def describe(self, preview: bytes, facts: PixelFacts) -> VisionAnswer:
        """As `LocalVision.describe`."""
        answer: VisionAnswer = self.call("describe", VisionAnswer, preview, facts)
        return replace(answer, metadata=clean_metadata(answer.metadata))


class ResidentEmbedder(Resident):
    """The offline embedder, as `LocalEmbedder`."""

    recipe: Recipe = LocalEmbedder.recipe

    def embed(self, text: str) -> Embedding:
        """As `LocalEmbedder.embed`."""
        embedding: Embedding = self.call("embed", Embedding, text)
        return embedding


def _answer(connection: socket.socket, functions: dict[str, Callable[..., Any]]) -> None:
    # Of a run that was killed meanwhile, or of somebody who is no run.
    with connection, contextlib.suppress(OSError, EOFError, MalformedMessageError):
        stream = TimedStream(connection, QUESTION_SECONDS)
        name, arguments = validate(tuple[str, list[Any]], read_message(stream, MAX_BYTES))
        function = functions.get(name)
        if function is None:
            return
        values = validate_arguments(function, arguments)
        try:
            answer = {"value": function(*values)}
        except Exception as error:
            answer = describe_error(error)
        stream.allow(QUESTION_SECONDS)
        try:
            write_message(stream, answer)
        except (TypeError, ValueError) as error:
            write_message(stream, describe_error(error))


def main() -> None:
    """Serves until the worker that started it, and holds the other end of its standard input, ends."""
    settings = Settings.load()
    threading.Thread(
        target=serve, args=(settings.resident_address, settings.index_uri), daemon=True
    ).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
