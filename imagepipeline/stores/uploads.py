"""UploadQueue: the Redis lists that uploaders push to and the sensor reads.

An entry leaves `wait` only after the catalogue has recorded it, so a crash repeats a step and loses
nothing. Ingest uses only commands that Redis accepts when its memory is full, so that a full Redis
drains. Malformed entries go to `dead` with a reason; the newest are kept. `active` shows what is
being processed; nothing depends on it.
"""

import base64
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Set
from contextlib import suppress
from typing import Annotated, Any

import redis
from pydantic import BaseModel, Field

from imagepipeline.errors import InvalidUploadError
from imagepipeline.models import Upload
from imagepipeline.stores.connection import connect, translated_errors

DEFAULT_PREFIX = "image-processing"
SHOWN_CHARACTERS = 200
RETRYABLE_BYTES = 1024
MAX_DEAD = 1000  # of up to 4 kB each, so that malformed entries cannot fill the server
READ_TOGETHER = 25  # entries in one reply, as each may be as long as the server allows
MAX_READ_BYTES = 4_000_000  # stop reading here: twice the size of 500 well-formed entries


class DeadLetter(BaseModel):
    """An entry as it is stored in `dead`."""

    id: str
    entry: str
    raw: str | None
    reason: str
    copies: int
    at: Annotated[float, Field(ge=0, le=32_503_680_000)]  # to the year 3000


class UploadQueue:
    """The three lists `{prefix}:wait`, `{prefix}:active` and `{prefix}:dead` of one Redis server.

    Args:
        url: `redis://`, `rediss://` or `unix://` of a Redis or Valkey, version 6.2 or later.
        prefix: first part of the keys.
    """

    def __init__(self, url: str, prefix: str = DEFAULT_PREFIX) -> None:
        self.wait_key, self.active_key, self.dead_key = (
            f"{prefix}:{name}" for name in ("wait", "active", "dead")
        )
        self._dropped_key = f"{self.dead_key}:dropped"
        self.redis: Any = connect(url)

    def close(self) -> None:
        """Closes all connections; a later use opens new ones."""
        self.redis.close()

    def enqueue(
        self,
        image_id: str,
        path: str | None = None,
        priority: int = 0,
        tenant: str = "",
        focus: tuple[float, float] | None = None,
    ) -> None:
        """Requests the processing of an image, whose original must be in place.

        Args:
            image_id: 1 to 64 letters, digits, `-` or `_`.
            path: the original's path below the storage root; by default the one file
                `original/<image_id>.*`.
            priority: -1000 to 1000; higher runs sooner.
            tenant: whose upload it is; empty for none.
            focus: what crops keep in view: x and y, 0 to 1; None keeps what an earlier push said.

        Raises:
            InvalidUploadError: an argument is malformed; nothing was pushed.
            StackError: Redis does not answer or accept it.
        """
        entry = Upload(image_id, path, priority, tenant, focus=focus).to_entry()
        with translated_errors():
            self.redis.lpush(self.wait_key, entry)

    def read(self, limit: int) -> Counter[bytes]:
        """Up to `limit` entries with the number of copies of each, oldest first; removes nothing.

        Entries that an earlier version left in `active` come first. Copies are ordered by the last
        one. Fewer entries are returned if they are long: a reply takes memory in the server, which
        an uploader could exhaust.
        """
        waiting: list[bytes] = []
        with translated_errors():
            left = [
                entry for entry in self.redis.lrange(self.active_key, 0, -1) if not _is_shown(entry)
            ]
            while len(waiting) < limit and sum(map(len, waiting)) < MAX_READ_BYTES:
                first, last = -min(len(waiting) + READ_TOGETHER, limit), -len(waiting) - 1
                older = self.redis.lrange(self.wait_key, first, last)
                if not older:
                    break
                waiting = [*older, *waiting]
        counted: Counter[bytes] = Counter()
        for entry in [*left[::-1], *waiting[::-1]]:
            counted[entry] = counted.pop(entry, 0) + 1
        return counted

    def find_waiting(self, image_ids: Set[str]) -> dict[str, list[bytes]]:
        """The different entries of some images on the list, by image ID; removes nothing."""
        found: dict[str, list[bytes]] = {}
        with translated_errors():
            # From the end where entries are pushed: those that are taken off at the other end
            # meanwhile move none of the rest.
            for first in range(0, self.redis.llen(self.wait_key), READ_TOGETHER):
                for entry in self.redis.lrange(self.wait_key, first, first + READ_TOGETHER - 1):
                    with suppress(InvalidUploadError):
                        image_id = Upload.from_entry(entry).image_id
                        if image_id in image_ids and entry not in found.get(image_id, []):
                            found.setdefault(image_id, []).append(entry)
        return found

    def withdraw(self, entry: bytes) -> bool:
        """Removes all copies of an entry from the list; False if there are none any more."""
        with translated_errors():
            return bool(self.redis.lrem(self.wait_key, 0, entry))

    def wait(self, seconds: float) -> None:
        """Waits up to `seconds` (under 5) for an entry; returns at once if Redis is full."""
        with translated_errors(), suppress(redis.exceptions.OutOfMemoryError):
            # Moves the last entry to where it is: the only blocking command that changes nothing.
            self.redis.blmove(self.wait_key, self.wait_key, seconds, "RIGHT", "RIGHT")

    def acknowledge(self, entries: Mapping[bytes, int]) -> None:
        """Removes copies of entries, as many as given; call it after the catalogue has committed.

        It removes the oldest copies: one that was pushed meanwhile stays. Only one reader at a time
        may call it.
        """
        with translated_errors(), self.redis.pipeline(transaction=False) as pipe:
            for entry, copies in entries.items():
                self._forget(pipe, entry, copies)
            pipe.execute()

    def show_active(self, run_ids: Mapping[str, str]) -> None:
        """Writes what is being processed to `active`, as JSON with `imageId` and `runId`.

        If a full Redis refuses, the list stays as it was.
        """
        shown = [
            json.dumps({"imageId": image_id, "runId": run_id})
            for image_id, run_id in sorted(run_ids.items())
        ]
        with translated_errors(), suppress(redis.exceptions.OutOfMemoryError):
            if self.redis.lrange(self.active_key, 0, -1) == [entry.encode() for entry in shown]:
                return
            with self.redis.pipeline(transaction=True) as pipe:
                pipe.delete(self.active_key)
                if shown:
                    pipe.rpush(self.active_key, *shown)
                pipe.execute()

    def dead_letter(self, entry: bytes, copies: int, reason: str) -> None:
        """Moves copies of a malformed entry to `dead`.

        There it is JSON: `id`, `entry` (escaped, at most 200 characters), `raw` (base64, if the
        entry has at most 1 kB), `reason`, `copies`, `at` (Unix seconds). The newest `MAX_DEAD` are
        kept; see `count_dropped`.
        """
        letter = json.dumps(_build_letter(entry, copies, reason, round(time.time(), 3)))
        with translated_errors(), self.redis.pipeline(transaction=True) as pipe:
            pipe.lpush(self.dead_key, letter)
            pipe.ltrim(self.dead_key, 0, MAX_DEAD - 1)
            self._forget(pipe, entry, copies)
            dropped = pipe.execute()[0] - MAX_DEAD
        if dropped > 0:
            # Separate, as the number is known only now. A failure here loses the count, no entry.
            with translated_errors(), suppress(redis.exceptions.OutOfMemoryError):
                self.redis.incrby(self._dropped_key, dropped)

    def count_dropped(self) -> int:
        """How many dead letters were dropped for newer ones since `dead` was last empty."""
        with translated_errors():
            return int(self.redis.get(self._dropped_key) or 0)

    def list_dead(self) -> list[dict[str, Any]]:
        """The dead letters, newest first, as `dead_letter` wrote them, and the bytes `stored`.

        An entry that somebody else wrote is returned as a letter, too.
        """
        with translated_errors():
            return [_read_letter(stored) for stored in self.redis.lrange(self.dead_key, 0, -1)]

    def retry_dead(self, letter: Mapping[str, Any]) -> None:
        """Pushes a dead letter's entry again and removes it from `dead`.

        Raises:
            InvalidUploadError: it was too long to be kept.
        """
        if letter["raw"] is None:
            raise InvalidUploadError(
                f"{letter['id']} was too long to be kept: push the image's ID again instead"
            )
        with translated_errors(), self.redis.pipeline(transaction=True) as pipe:
            pipe.lpush(self.wait_key, base64.b64decode(letter["raw"]))
            self._take_off(pipe, letter)

    def discard_dead(self, letter: Mapping[str, Any]) -> None:
        """Removes a letter from `dead`."""
        with translated_errors(), self.redis.pipeline(transaction=True) as pipe:
            self._take_off(pipe, letter)

    def count(self) -> dict[str, int]:
        """The lengths of the lists: `waiting` (not in the catalogue yet) and `dead`."""
        with translated_errors(), self.redis.pipeline(transaction=True) as pipe:
            for key in (self.wait_key, self.dead_key):
                pipe.llen(key)
            waiting, dead = pipe.execute()
        return {"waiting": waiting, "dead": dead}

    def _take_off(self, pipe: Any, letter: Mapping[str, Any]) -> None:
        """Executes `pipe` and removes a letter; with the last one, resets the count of dropped."""
        pipe.lrem(self.dead_key, 0, letter["stored"])
        pipe.llen(self.dead_key)
        if pipe.execute()[-1] == 0:
            self.redis.delete(self._dropped_key)

    def _forget(self, pipe: Any, entry: bytes, copies: int) -> None:
        pipe.lrem(self.wait_key, -copies, entry)
        pipe.lrem(self.active_key, copies, entry)


def _build_letter(entry: bytes, copies: int, reason: str, at: float) -> dict[str, Any]:
    return {
        "id": "dead-" + hashlib.sha256(entry).hexdigest()[:12],
        "entry": ascii(entry[:SHOWN_CHARACTERS])[2:-1][:SHOWN_CHARACTERS],
        "raw": base64.b64encode(entry).decode() if len(entry) <= RETRYABLE_BYTES else None,
        "reason": reason,
        "copies": copies,
        "at": at,
    }


def _read_letter(stored: bytes) -> dict[str, Any]:
    try:
        letter = DeadLetter.model_validate_json(stored).model_dump()
        base64.b64decode(letter["raw"] or "", validate=True)
    except ValueError:
        letter = _build_letter(
            stored, 1, "another program wrote this entry, which is not a dead letter", 0
        )
    return {**letter, "stored": stored}


def _is_shown(entry: bytes) -> bool:
    """Whether an entry of `active` was put there by `show_active`."""
    return entry.startswith(b'{"imageId": ') and b'"runId": ' in entry
