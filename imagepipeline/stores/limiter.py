"""CallLimiter: the rate limit of paid calls for all processes, counted in Redis."""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import redis

from imagepipeline.errors import PostponedError
from imagepipeline.rates import CallLimit, parse_limits
from imagepipeline.stores.connection import connect

# How many permits of a limit are used, and the milliseconds until there may be another. It uses the
# server's clock: by the callers' clocks, a late one would not see every call, and let one too many
# pass. Calls that are later than now were made before that clock was set back; they count from now.
LOOK = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local function look(key, limit, window_ms)
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now_ms - window_ms)
    for _, call in ipairs(redis.call('ZRANGEBYSCORE', key, '(' .. now_ms, '+inf')) do
        redis.call('ZADD', key, now_ms, call)
    end
    local used = redis.call('ZCARD', key)
    if used < limit then
        return used, 0
    end
    local last_in_the_way = redis.call('ZRANGE', key, -limit, -limit, 'WITHSCORES')
    return used, last_in_the_way[2] + window_ms - now_ms
end
"""
LOOK_AT_ONE = f"{LOOK} return {{look(KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]))}}"
# One key for each limit, with its number of calls and its window in milliseconds; the last argument
# names the call. Either counts the call under all limits and returns 0, or under none and returns
# the milliseconds until there may be a permit.
TAKE = f"""{LOOK}
local wait_ms = 0
for i, key in ipairs(KEYS) do
    local _, wait_for_it_ms = look(key, tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i]))
    wait_ms = math.max(wait_ms, wait_for_it_ms)
end
if wait_ms == 0 then
    for i, key in ipairs(KEYS) do
        redis.call('ZADD', key, now_ms, ARGV[#ARGV])
        redis.call('PEXPIRE', key, ARGV[2 * i])
    end
end
return wait_ms
"""


@dataclass(frozen=True)
class Permits:
    """What the limits leave.

    Attributes:
        left: the number of permits left, None for no limit.
        wait_seconds: until the next permit.
        is_shared: whether the scarcest limit is for all stages together.
    """

    left: int | None
    wait_seconds: float
    is_shared: bool


class CallLimiter:
    """Grants permits for calls.

    The limits are those set by `set_limits`, else the default ones; they are read for every permit.

    Args:
        url: the Redis server's.
        prefix: of the keys.
        default: limits as `parse_limits` reads them.
    """

    def __init__(self, url: str, prefix: str, default: str) -> None:
        self._redis = connect(url)
        # Sent again to a restarted Redis.
        self._script = self._redis.register_script(TAKE)
        self._look = self._redis.register_script(LOOK_AT_ONE)
        self._key = f"{prefix}:rate-limit"
        self._default = default
        parse_limits(default)

    def close(self) -> None:
        """Closes the connection."""
        self._redis.close()

    def get_limits(self) -> str:
        """The limits in force, as text."""
        with _answering():
            stored = self._redis.get(self._key)
        return stored.decode() if isinstance(stored, bytes) else self._default

    def set_limits(self, text: str | None) -> None:
        """Changes the limits from the next permit on, in every process; None resets them."""
        with _answering():
            if text is None:
                self._redis.delete(self._key)
            else:
                parse_limits(text)
                self._redis.set(self._key, text)

    def look(self, stage: str, within_seconds: float = 0) -> Permits:
        """What the limits of a stage leave; takes no permit.

        A limit whose window is at most `within_seconds` leaves all its permits of that time.

        Raises:
            PostponedError: Redis does not answer.
        """
        found = []
        for limit in parse_limits(self.get_limits()):
            if limit.stage not in (None, stage):
                continue
            if limit.seconds <= within_seconds:
                left, wait_seconds = limit.count * int(within_seconds // limit.seconds), 0.0
            else:
                left, wait_seconds = self._look_at(limit)
            found.append((left, -wait_seconds, limit.stage is None))
        if not found:
            return Permits(None, 0, False)
        left, _, is_shared = min(found)
        return Permits(left, max(-wait for _, wait, _ in found), is_shared)

    def count_used(self) -> list[tuple[CallLimit, int]]:
        """Each limit with the number of its permits that are used in its window now.

        Raises:
            PostponedError: Redis does not answer.
        """
        limits = parse_limits(self.get_limits())
        return [(limit, limit.count - self._look_at(limit)[0]) for limit in limits]

    def _look_at(self, limit: CallLimit) -> tuple[int, float]:
        """How many permits one limit has left, and the seconds until the next."""
        key = f"{self._key}:{limit.stage or 'all'}:{limit.seconds}"
        with _answering():
            used, wait_ms = self._look([key], [limit.count, limit.seconds * 1000])
        return max(0, limit.count - used), wait_ms / 1000

    def acquire(self, stage: str, timeout_seconds: float) -> bool:
        """Waits up to `timeout_seconds` for a permit for one call; returns whether it got one.

        Raises:
            PostponedError: Redis does not answer; no permit was granted.
        """
        deadline = time.monotonic() + timeout_seconds
        limits = [
            limit for limit in parse_limits(self.get_limits()) if limit.stage in (None, stage)
        ]
        # The window is in the key: a shorter one would drop calls that a longer one must count.
        keys = [f"{self._key}:{limit.stage or 'all'}:{limit.seconds}" for limit in limits]
        windows = [number for limit in limits for number in (limit.count, limit.seconds * 1000)]
        call = secrets.token_hex(8)
        while limits:
            with _answering():
                wait_ms = self._script(keys, [*windows, call])
            if wait_ms == 0:
                break
            if time.monotonic() + wait_ms / 1000 > deadline:
                return False
            time.sleep(wait_ms / 1000)
        return True


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise PostponedError(
            f"Redis, which counts the paid calls, does not answer ({type(error).__name__}): start "
            "the stack with `imagepipeline up`, or check REDIS_URL"
        ) from None
