"""The connection to Redis, for all our own commands; Celery has its own."""

import redis

CONNECT_SECONDS = 2
ANSWER_SECONDS = 5  # after that, a silent server counts as down


def connect(url: str) -> redis.Redis:
    """A client of the server at a `redis://`, `rediss://` or `unix://` URL.

    It connects when first used.
    """
    return redis.Redis.from_url(
        url, socket_connect_timeout=CONNECT_SECONDS, socket_timeout=ANSWER_SECONDS
    )
