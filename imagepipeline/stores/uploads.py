"""UploadQueue: the Redis lists an uploader pushes to and the sensor takes from.

An entry moves `wait` → `active` → gone. It leaves `active` only when the catalogue has recorded it, so a
crash anywhere repeats a step and loses nothing. What cannot be read ends in `dead`, with its reason.
"""

import base64
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import redis

from imagepipeline.errors import InvalidUploadError, RedisClusterError, StackError
from imagepipeline.models import Upload

DEFAULT_PREFIX = "image-processing"
SHOWN_CHARACTERS = 200
RETRYABLE_BYTES = 1024
# What a server that belongs to a cluster answers to commands that name keys of several slots.
CLUSTER_ERRORS = (redis.exceptions.AskError, redis.exceptions.ClusterCrossSlotError, redis.exceptions.ClusterError)


class UploadQueue:
    """The three lists `{prefix}:wait`, `{prefix}:active` and `{prefix}:dead` of one Redis server.

    Args:
        url: `redis://`, `rediss://` or `unix://`; any Redis or Valkey from 6.2 on.
        prefix: first part of the keys.
    """

    def __init__(self, url: str, prefix: str = DEFAULT_PREFIX) -> None:
        self.wait_key, self.active_key, self.dead_key = (f"{prefix}:{name}" for name in ("wait", "active", "dead"))
        self.redis: Any = redis.Redis.from_url(url, socket_connect_timeout=2, socket_timeout=5)

    def close(self) -> None:
        """Closes all connections; a later use opens new ones."""
        self.redis.close()

    def enqueue(self, image_id: str, path: str | None = None, priority: int = 0) -> None:
        """Asks for an image to be processed; its original must be in place.

        Args:
            image_id: 1 to 64 letters, digits, `-` or `_`.
            path: the original's path below the storage root; by default the one file `original/<image_id>.*`.
            priority: -1000 to 1000, higher is sooner.

        Raises:
            InvalidUploadError: an argument is malformed; nothing was pushed.
            StackError: Redis does not take it.
        """
        entry = Upload(image_id, path, priority).to_entry()
        with _translated_errors():
            self.redis.lpush(self.wait_key, entry)

    def claim(self, limit: int) -> Counter[bytes]:
        """Up to `limit` entries, oldest first, with the number of copies of each.

        Those that a crash left in `active` come first, then new ones from `wait`.
        """
        with _translated_errors():
            entries = self.redis.lrange(self.active_key, -limit, -1)[::-1]
            with self.redis.pipeline(transaction=False) as pipe:
                for _ in range(limit - len(entries)):
                    pipe.lmove(self.wait_key, self.active_key, "RIGHT", "LEFT")
                moved = pipe.execute()
        return Counter([*entries, *(entry for entry in moved if entry is not None)])

    def wait(self, seconds: float) -> None:
        """Returns when there is an entry, which it moves to `active`, or after that time; it must be under 5 s."""
        with _translated_errors():
            self.redis.blmove(self.wait_key, self.active_key, seconds, "RIGHT", "LEFT")

    def acknowledge(self, entry: bytes, copies: int) -> None:
        """Forgets claimed copies of an entry: call it after the catalogue has committed."""
        with _translated_errors():
            self.redis.lrem(self.active_key, copies, entry)

    def dead_letter(self, entry: bytes, copies: int, reason: str) -> None:
        """Moves claimed copies of an unreadable entry to `dead`.

        There it is JSON: `id`, `entry` (escaped, at most 200 characters), `raw` (base64, if the entry has at
        most 1 kB), `reason`, `copies`, `at` (Unix seconds).
        """
        letter = json.dumps(
            {
                "id": "dead-" + hashlib.sha256(entry).hexdigest()[:12],
                "entry": ascii(entry)[2:-1][:SHOWN_CHARACTERS],
                "raw": base64.b64encode(entry).decode() if len(entry) <= RETRYABLE_BYTES else None,
                "reason": reason,
                "copies": copies,
                "at": round(time.time(), 3),
            }
        )
        with _translated_errors(), self.redis.pipeline(transaction=True) as pipe:
            pipe.lpush(self.dead_key, letter)
            pipe.lrem(self.active_key, copies, entry)
            pipe.execute()

    def list_dead(self) -> list[dict[str, Any]]:
        """The dead letters, newest first, as `dead_letter` wrote them."""
        with _translated_errors():
            return [json.loads(letter) for letter in self.redis.lrange(self.dead_key, 0, -1)]

    def retry_dead(self, letter: Mapping[str, Any]) -> None:
        """Pushes a dead letter's entry once more and takes it off `dead`.

        Raises:
            InvalidUploadError: it was too long to be kept whole.
        """
        if letter["raw"] is None:
            raise InvalidUploadError(f"{letter['id']} was too long to be kept: push the image's ID again instead")
        with _translated_errors(), self.redis.pipeline(transaction=True) as pipe:
            pipe.lrem(self.dead_key, 0, json.dumps(dict(letter)))
            pipe.lpush(self.wait_key, base64.b64decode(letter["raw"]))
            pipe.execute()

    def discard_dead(self, letter: Mapping[str, Any]) -> None:
        """Takes a letter off `dead`."""
        with _translated_errors():
            self.redis.lrem(self.dead_key, 0, json.dumps(dict(letter)))

    def count(self) -> dict[str, int]:
        """The lengths of the lists: `waiting` (`wait` and `active`: not in the catalogue yet) and `dead`."""
        with _translated_errors(), self.redis.pipeline(transaction=True) as pipe:
            for key in (self.wait_key, self.active_key, self.dead_key):
                pipe.llen(key)
            waiting, active, dead = pipe.execute()
        return {"waiting": waiting + active, "dead": dead}


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Turns Redis' errors into one of ours; the message leaves out the address, which may hold a password."""
    try:
        yield
    except CLUSTER_ERRORS:
        raise RedisClusterError(
            "Redis runs as a cluster, which cannot move an entry from one list to another: "
            "use one server (cluster-enabled no), with replicas if you like"
        ) from None
    except redis.ResponseError as error:  # such as a key of another type: its text is the server's, without secrets
        raise StackError(f"Redis refuses the command: {error}") from None
    except redis.RedisError as error:
        raise StackError(
            f"Redis does not answer ({type(error).__name__}): start the stack with `imagepipeline up`, "
            "or check REDIS_URL"
        ) from None
