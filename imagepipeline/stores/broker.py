"""Celery's use of Redis: how runs reach the workers, and which of them still wait for one.

Fast to import: `services` writes these settings into the `dagster.yaml` of every process.
"""

import json
from typing import Any
from urllib.parse import urlsplit

import redis

from imagepipeline.errors import PostponedError
from imagepipeline.stores.connection import connect

QUEUE = "dagster"  # dagster-celery's only queue
CONNECT_SECONDS = 5
ANSWER_SECONDS = 30  # of Redis; the longest wait for a task is 1 s
# How long a task may take from Redis to a worker's child before another worker takes it. The child
# acknowledges it when it starts, so this limits milliseconds, not a run.
HANDOVER_SECONDS = 60
RESTORE_INTERVAL_SECONDS = 10
KEEP_FAILURES_SECONDS = 3600


def build_config(prefix: str, answer_seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
    """Celery's settings for processes that submit runs and for workers, as plain values.

    Redis must answer within `answer_seconds`. All keys and channels begin with `{prefix}:runs:`.
    Results are kept only for tasks whose process died.
    """
    place = {
        "global_keyprefix": f"{prefix}:runs:",
        "socket_connect_timeout": CONNECT_SECONDS,
        "socket_timeout": answer_seconds,
    }
    return {
        "broker_transport_options": {
            **place,
            "priority_steps": [0],  # Dagster's own queue orders runs; priorities would be ten lists
            "visibility_timeout": HANDOVER_SECONDS,
            "unacked_restore_interval": RESTORE_INTERVAL_SECONDS,
            "unacked_restore_throttle": 1,
            "max_retries": 3,
            "interval_start": 0,
            "interval_step": 0.2,
            "interval_max": 0.5,
        },
        "result_backend_transport_options": place,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": True,
        "result_expires": KEEP_FAILURES_SECONDS,
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,  # waiting tasks stay on the list, for any worker
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_send_task_events": False,
        "broker_channel_error_retry": True,  # for example if Redis is full
    }


def build_url(redis_url: str) -> str:
    """The URL of a Redis server in Celery's notation."""
    if redis_url.startswith("unix://"):
        path, _, query = redis_url.removeprefix("unix://").partition("?")
        database = query.partition("db=")[2].partition("&")[0] or "0"
        return f"redis+socket://{path}?virtual_host={database}"
    if redis_url.startswith("rediss://") and "ssl_cert_reqs=" not in redis_url:
        return f"{redis_url}{'&' if urlsplit(redis_url).query else '?'}ssl_cert_reqs=required"
    return redis_url


class TaskQueue:
    """The tasks (one for each run) that no worker has taken yet."""

    def __init__(self, redis_url: str, prefix: str) -> None:
        self._redis = connect(redis_url)
        self._key = f"{prefix}:runs:{QUEUE}"

    def list_waiting(self) -> set[str]:
        """The IDs of the tasks, at most as many as runs may be in progress.

        Raises:
            PostponedError: Redis does not answer.
        """
        try:
            messages: list[bytes] = self._redis.lrange(self._key, 0, -1)  # type: ignore[assignment]
        except redis.RedisError as error:
            raise PostponedError(
                f"the workers' Redis does not answer ({type(error).__name__})"
            ) from None
        return {json.loads(message)["headers"]["id"] for message in messages}

    def close(self) -> None:
        """Closes the connection."""
        self._redis.close()
