"""OpenAI's Batch API: many requests in one file, answered within a day at half the price."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from imagepipeline.errors import BadAnswerError, BatchError, ProviderRejectedError
from imagepipeline.services.openai_client import ProviderClient

# OpenAI's limits on one batch.
MAX_REQUESTS, MAX_FILE_BYTES = 50_000, 200_000_000
MAX_ANSWERS_BYTES = 500_000_000
TRANSFER_SECONDS = 1800.0  # for uploading or downloading a file
ENDED = ("completed", "failed", "expired", "cancelled")
PAGE_SIZE, MAX_PAGES = 100, 20  # of the list of batches
CODE = re.compile(r"[a-z][a-z0-9_]{0,40}")


@dataclass(frozen=True)
class BatchState:
    """What the provider says of a batch.

    Attributes:
        batch_id: the provider's ID.
        file_id: the file with its requests.
        status: the provider's word, such as `in_progress` or one of ENDED.
        files: the files with its answers and its errors, if there are any yet.
        done: how many requests have ended so far.
        code: why it failed as a whole; empty if it did not.
    """

    batch_id: str
    file_id: str
    status: str
    files: tuple[str, ...] = ()
    done: int = 0
    code: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in ENDED


class BatchApi:
    """The Batch API of the provider that answers chat requests at `base_url`."""

    def __init__(self, name: str, api_key: str, base_url: str) -> None:
        self._name = name
        self._provider = ProviderClient(
            name, api_key, base_url, MAX_ANSWERS_BYTES, TRANSFER_SECONDS
        )

    def check(self) -> None:
        """Checks that the provider has batches at all.

        Raises:
            BatchError: it has none.
        """
        try:
            self._list_page(1, None)
        except (ProviderRejectedError, BadAnswerError):
            raise BatchError(
                f"the provider of {self._name} has no Batch API: run `apply` without --batch"
            ) from None

    def upload(self, file: IO[bytes]) -> str:
        """Uploads a file of requests; gives its ID."""
        with self._provider.call() as ask:
            raw = ask(
                lambda client: client.files.with_raw_response.create(
                    file=("requests.jsonl", file), purpose="batch"
                )
            )
            return str(json.loads(raw.content)["id"])

    def create(self, file_id: str) -> BatchState:
        """Has the requests in a file answered, from now on at a price."""
        with self._provider.call() as ask:
            raw = ask(
                lambda client: client.batches.with_raw_response.create(
                    input_file_id=file_id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                )
            )
            return _read_state(json.loads(raw.content))

    def retrieve(self, batch_id: str) -> BatchState:
        """The state of a batch."""
        with self._provider.call() as ask:
            raw = ask(lambda client: client.batches.with_raw_response.retrieve(batch_id))
            return _read_state(json.loads(raw.content))

    def find(self, file_id: str) -> BatchState | None:
        """The batch that was created from a file; only the newest 2,000 are looked through."""
        after = None
        for _ in range(MAX_PAGES):
            states, has_more = self._list_page(PAGE_SIZE, after)
            for state in states:
                if state.file_id == file_id:
                    return state
            if not states or not has_more:
                break
            after = states[-1].batch_id
        return None

    def read(self, file_id: str) -> Iterator[Mapping[str, Any]]:
        """The lines of a file of answers, as far as they are JSON objects."""
        with self._provider.call() as ask:
            raw = ask(lambda client: client.files.with_raw_response.content(file_id))
            content = raw.content
        for line in content.splitlines():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value

    def delete(self, file_id: str) -> None:
        """Deletes a file at the provider."""
        with self._provider.call() as ask:
            ask(lambda client: client.files.with_raw_response.delete(file_id))

    def _list_page(self, size: int, after: str | None) -> tuple[list[BatchState], bool]:
        """Some batches, newest first, and whether there are more."""
        query = {"limit": size} | ({"after": after} if after else {})
        with self._provider.call() as ask:
            raw = ask(lambda client: client.batches.with_raw_response.list(extra_query=query))
            page = json.loads(raw.content)
            return [_read_state(one) for one in page["data"]], bool(page.get("has_more"))


def _read_state(batch: Mapping[str, Any]) -> BatchState:
    files = (batch.get("output_file_id"), batch.get("error_file_id"))
    counts = batch.get("request_counts") or {}
    errors = (batch.get("errors") or {}).get("data") or [{}]
    code = str(errors[0].get("code") or "")
    return BatchState(
        str(batch["id"]),
        str(batch["input_file_id"]),
        str(batch["status"]),
        tuple(str(file_id) for file_id in files if file_id),
        int(counts.get("completed") or 0) + int(counts.get("failed") or 0),
        code if CODE.fullmatch(code) else "",
    )
