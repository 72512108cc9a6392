"""EventStream: the Redis stream on which apps get events, for consumer groups."""

import json
from collections.abc import Iterable
from typing import Any

from imagepipeline.events import EventType
from imagepipeline.stores.connection import connect, translated_errors

READ_TOGETHER = 500
FIELD = "event"


class EventStream:
    """The stream `{prefix}:events` of one Redis server.

    Each entry has one field, `event`, with the JSON of `imagepipeline.events.Event`.

    Args:
        url: `redis://`, `rediss://` or `unix://` of a Redis or Valkey, version 6.2 or later.
        prefix: first part of the key.
        max_length: about how many events it keeps; the server may keep some more.
    """

    def __init__(self, url: str, prefix: str, max_length: int) -> None:
        self.key = f"{prefix}:events"
        self._max_length = max_length
        self.redis: Any = connect(url)

    def close(self) -> None:
        """Closes all connections; a later use opens new ones."""
        self.redis.close()

    def add(self, payloads: Iterable[str]) -> None:
        """Adds events in this order.

        Raises:
            StackError: Redis does not answer or accept them; it may have got some.
        """
        with translated_errors(), self.redis.pipeline(transaction=False) as pipe:
            for payload in payloads:
                pipe.xadd(self.key, {FIELD: payload}, maxlen=self._max_length, approximate=True)
            pipe.execute()

    def remove(self, image_id: str) -> int:
        """Deletes the events about an image, which quote its description; returns their number.

        Those that say that it was erased stay: apps need them.

        Raises:
            StackError: Redis does not answer.
        """
        removed, last = 0, "-"
        with translated_errors():
            while entries := self.redis.xrange(self.key, last, count=READ_TOGETHER):
                found = [number for number, fields in entries if _is_about(fields, image_id)]
                removed += self.redis.xdel(self.key, *found) if found else 0
                last = f"({entries[-1][0].decode()}"
        return removed


def _is_about(fields: dict[bytes, bytes], image_id: str) -> bool:
    try:
        event = json.loads(fields[FIELD.encode()])
        return bool(event["imageId"] == image_id and event["type"] != EventType.ERASED)
    except (KeyError, TypeError, ValueError):  # another program wrote it
        return False
