"""The rate limit is shared by all processes through a real Redis."""

import subprocess
import sys
import threading

import pytest
import redis

from imagepipeline.errors import PostponedError, SettingsError
from imagepipeline.rates import CallLimit, parse_limits
from imagepipeline.stores.limiter import CallLimiter, Permits

CALLER = """
import sys
from imagepipeline.stores.limiter import CallLimiter
limiter = CallLimiter(sys.argv[1], "shared", "8/second")
for _ in range(12):
    assert limiter.acquire("metadata", 60)
"""


@pytest.fixture
def limiter(redis_url, queue):
    limiter = CallLimiter(redis_url, "test", "2/hour")
    yield limiter
    limiter.close()


def test_limits_are_parsed():
    assert parse_limits("off") == ()
    assert parse_limits("10/minute") == (CallLimit(10, 60),)
    assert parse_limits("metadata=10/minute, embedding=5/second") == (
        CallLimit(10, 60, "metadata"),
        CallLimit(5, 1, "embedding"),
    )


@pytest.mark.parametrize(
    "text", ["", "10", "10/year", "0/minute", "-1/minute", "thing=1/minute", "1/minute;2/minute"]
)
def test_the_error_for_a_malformed_limit_shows_the_format(text):
    with pytest.raises(SettingsError, match="10/minute"):
        parse_limits(text)


def test_calls_over_the_limit_wait(limiter):
    assert limiter.acquire("metadata", 1)
    assert limiter.acquire("embedding", 1)
    assert not limiter.acquire("metadata", 0.2)


def test_each_stage_may_have_its_own_limit(limiter):
    limiter.set_limits("metadata=1/hour,embedding=2/hour")
    assert [limiter.acquire("metadata", 0.1) for _ in range(2)] == [True, False]
    assert [limiter.acquire("embedding", 0.1) for _ in range(3)] == [True, True, False]
    assert limiter.acquire("search", 0.1)


def test_a_new_limit_takes_effect_at_once_in_every_process(limiter, redis_url):
    other = CallLimiter(redis_url, "test", "2/hour")
    assert [limiter.acquire("metadata", 0.1) for _ in range(3)] == [True, True, False]
    other.set_limits("3/hour")
    assert limiter.get_limits() == "3/hour"
    assert [limiter.acquire("metadata", 0.1) for _ in range(2)] == [True, False]
    other.set_limits("off")
    assert limiter.acquire("metadata", 0.1)
    other.set_limits(None)
    assert not limiter.acquire("metadata", 0.1)
    with pytest.raises(SettingsError):
        other.set_limits("fast")
    other.close()


def test_after_the_servers_clock_is_set_back_calls_count_for_one_window(limiter, queue):
    limiter.set_limits("2/minute")
    assert [limiter.acquire("metadata", 0) for _ in range(3)] == [True, True, False]
    key = "test:rate-limit:all:60"
    for call in queue.redis.zrange(key, 0, -1):
        queue.redis.zincrby(key, 3_600_000, call)  # as if the clock had been an hour ahead
    assert not limiter.acquire("metadata", 0)
    permits = limiter.look("metadata")
    assert permits.left == 0
    assert 0 < permits.wait_seconds <= 60


def test_counting_continues_after_the_server_loses_its_scripts(limiter):
    limiter.acquire("metadata", 1)
    limiter._redis.script_flush()
    assert [limiter.acquire("metadata", 0.1) for _ in range(2)] == [True, False]


def test_a_server_that_is_down_permits_nothing():
    with pytest.raises(PostponedError, match=r"does not answer .*: start the stack with"):
        CallLimiter("redis://127.0.0.1:9/0", "test", "10/minute").acquire("metadata", 1)


@pytest.mark.parametrize("limits", ["3/second,5/day", "5/day,3/second"])
def test_two_limits_of_one_stage_are_both_enforced(redis_url, queue, limits):
    limiter = CallLimiter(redis_url, "two", limits)
    assert [limiter.acquire("metadata", 0) for _ in range(4)] == [True, True, True, False]
    assert [limiter.acquire("metadata", 2) for _ in range(3)] == [True, True, False]


def test_a_call_refused_by_one_limit_does_not_count_for_the_others(redis_url, queue):
    limiter = CallLimiter(redis_url, "none", "3/day,metadata=1/day")
    assert [limiter.acquire("metadata", 0) for _ in range(4)] == [True, False, False, False]
    assert [limiter.acquire("embedding", 0) for _ in range(3)] == [True, True, False]


def test_three_processes_together_never_exceed_the_limit(redis_url, queue):
    times_ms, watching = [], threading.Event()
    client = redis.Redis.from_url(redis_url)

    def watch():
        with client.monitor() as monitor:
            watching.set()
            for command in monitor.listen():
                words = command["command"].split()
                if words[0] == "ECHO":
                    return
                if words[:2] == ["ZADD", "shared:rate-limit:all:1"]:
                    times_ms.append(int(words[2]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert watching.wait(10)
    processes = [subprocess.Popen([sys.executable, "-c", CALLER, redis_url]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    client.echo("that is all")
    watcher.join(10)
    client.close()
    assert len(times_ms) == 36
    assert all(
        later - earlier >= 1000 for earlier, later in zip(times_ms, times_ms[8:], strict=False)
    )


def test_a_full_redis_still_counts(limiter, queue):
    queue.redis.config_set("maxmemory", 1)
    try:
        assert [limiter.acquire("metadata", 0) for _ in range(3)] == [True, True, False]
    finally:
        queue.redis.config_set("maxmemory", 0)


def test_looking_at_the_remaining_calls_uses_none(limiter):
    limiter.set_limits("metadata=2/hour,5/day,100/minute")
    assert limiter.look("metadata") == Permits(2, 0, False)
    limiter.acquire("metadata", 0)
    assert limiter.look("metadata").left == 1
    assert limiter.look("embedding", 180) == Permits(4, 0, True)
    limiter.acquire("metadata", 0)
    assert 3500 < limiter.look("metadata").wait_seconds <= 3600
    limiter.set_limits("100/minute")
    assert limiter.look("metadata", 180) == Permits(300, 0, True)
    limiter.set_limits("off")
    assert limiter.look("metadata", 180) == Permits(None, 0, False)
