"""How all our own questions to Redis connect."""

import redis

CONNECT_SECONDS = 2
ANSWER_SECONDS = 5  # after which a silent server counts as gone


def connect(url: str) -> redis.Redis:
    """A client of the server at `redis://`, `rediss://` or `unix://`; it connects when first used."""
    return redis.Redis.from_url(
        url, socket_connect_timeout=CONNECT_SECONDS, socket_timeout=ANSWER_SECONDS
    )
