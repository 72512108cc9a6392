"""The resident: one process per machine that serves the index and the local models to all runs.

These take seconds to import and load, so runs share one process for them. Runs reach it on a Unix
socket in a folder that only its owner may enter, with JSON messages of known types (`wire`). Under
`dagster dev` and in tests there is no resident, and each run loads index and models itself.
"""

import contextlib
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from imagepipeline.errors import (
    DiskFullError,
    ProviderRejectedError,
    ResidentDownError,
    StaleClaimError,
)
from imagepipeline.malloc import return_freed_memory
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
MAX_BYTES = 20_000_000  # of the binary part of a message
REQUEST_SECONDS = 30  # for the transfer of a whole request
RESPONSE_SECONDS = 300  # for a call and its response; loading models and slow buckets take time
ERRORS = (
    StaleClaimError,
    ProviderRejectedError,
    DiskFullError,
    OSError,
)  # that runs must distinguish


def serve(address: str, index_uri: str) -> None:
    """Serves calls on the Unix socket `address` until the process ends."""
    index, vision, embedder = BatchingIndex(index_uri), LocalVision(), LocalEmbedder()
    functions: dict[str, Callable[..., Any]] = {
        "upsert": index.upsert,
        "get": index.get,
        "describe": vision.describe,
        "embed": embedder.embed,
        "ping": ping,
    }
    Path(address).unlink(missing_ok=True)  # left by a resident that was killed
    # Imports LanceDB in the background, before the first upload needs it.
    threading.Thread(target=index.count_rows, daemon=True).start()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(BACKLOG)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_answer, args=(connection, functions), daemon=True).start()


def ping() -> bool:
    """Shows that the resident answers."""
    return True


class Resident:
    """A client of the resident at `address`; each call opens a new connection.

    A call may take `patience_seconds`.
    """

    def __init__(self, address: str, patience_seconds: float = RESPONSE_SECONDS) -> None:
        self._address = address
        self._patience_seconds = patience_seconds

    def call(self, name: str, kind: Any, *arguments: Any) -> Any:
        """Calls a function of the resident and returns its result, validated as `kind`.

        Raises:
            ResidentDownError: The resident is not running or died during the call, which may or may
                not have been carried out.
            Exception: Whatever the function raises; errors not in `ERRORS` become RuntimeError.
        """
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(REQUEST_SECONDS)
                connection.connect(self._address)
                stream = TimedStream(connection, REQUEST_SECONDS)
                write_message(stream, [name, arguments])
                stream.allow(self._patience_seconds)
                answer = validate(dict[str, Any], read_message(stream, MAX_BYTES))
                if answer.keys() == {"value"}:
                    return validate(kind, answer["value"])
                error = restore_error(answer, ERRORS)
        except (OSError, EOFError, MalformedMessageError) as problem:
            raise ResidentDownError(
                f"the resident does not answer ({type(problem).__name__}): "
                "the worker restarts it; the worker's log says why it ended"
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
    """The local vision model in the resident.

    The resident handles untrusted pictures, so its answers are cleaned again here.
    """

    recipe: Recipe = LocalVision.recipe

    def describe(self, preview: bytes, facts: PixelFacts) -> VisionAnswer:
        """See `LocalVision.describe`."""
        answer: VisionAnswer = self.call("describe", VisionAnswer, preview, facts)
        return replace(answer, metadata=clean_metadata(answer.metadata))


class ResidentEmbedder(Resident):
    """The local embedder in the resident."""

    recipe: Recipe = LocalEmbedder.recipe

    def embed(self, text: str) -> Embedding:
        """See `LocalEmbedder.embed`."""
        embedding: Embedding = self.call("embed", Embedding, text)
        return embedding


def _answer(connection: socket.socket, functions: dict[str, Callable[..., Any]]) -> None:
    # Errors here mean that the run was killed during the call, or that the client is not a run.
    with connection, contextlib.suppress(OSError, EOFError, MalformedMessageError):
        stream = TimedStream(connection, REQUEST_SECONDS)
        name, arguments = validate(tuple[str, list[Any]], read_message(stream, MAX_BYTES))
        function = functions.get(name)
        if function is None:
            return
        values = validate_arguments(function, arguments)
        try:
            answer = {"value": function(*values)}
        except Exception as error:
            answer = describe_error(error)
        stream.allow(REQUEST_SECONDS)
        try:
            write_message(stream, answer)
        except (TypeError, ValueError) as error:
            write_message(stream, describe_error(error))


def main() -> None:
    """Serves until the worker that started this process ends, which closes its standard input."""
    return_freed_memory()
    settings = Settings.load()
    threading.Thread(
        target=serve, args=(settings.resident_address, settings.index_uri), daemon=True
    ).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
