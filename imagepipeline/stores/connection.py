"""The connection to Redis, for all our own commands; Celery has its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import redis

from imagepipeline.errors import RedisClusterError, StackError

CONNECT_SECONDS = 2
ANSWER_SECONDS = 5  # after that, a silent server counts as down
# How a server in a cluster answers commands with keys of several slots.
CLUSTER_ERRORS = (
    redis.exceptions.AskError,
    redis.exceptions.ClusterCrossSlotError,
    redis.exceptions.ClusterError,
)


def connect(url: str) -> redis.Redis:
    """A client of the server at a `redis://`, `rediss://` or `unix://` URL.

    It connects when first used.
    """
    return redis.Redis.from_url(
        url, socket_connect_timeout=CONNECT_SECONDS, socket_timeout=ANSWER_SECONDS
    )


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turns errors of Redis into ours, without the address, which may hold a password.

    Raises:
        StackError: Redis does not answer, is full, or refuses the command.
    """
    try:
        yield
    except redis.exceptions.OutOfMemoryError:
        raise StackError(
            "Redis is full and accepts nothing more: wait until the pipeline has drained it, or "
            "raise its maxmemory"
        ) from None
    except CLUSTER_ERRORS:
        raise RedisClusterError(
            "Redis runs as a cluster, which spreads our lists over several servers and cannot "
            "change them in one step: use one server (cluster-enabled no), perhaps with replicas"
        ) from None
    except redis.ResponseError as error:  # the server's text, which contains no secret
        raise StackError(f"Redis refuses the command: {error}") from None
    except redis.RedisError as error:
        raise StackError(
            f"Redis does not answer ({type(error).__name__}): start the stack with "
            "`imagepipeline up`, or check REDIS_URL"
        ) from None
